"""Rivals, written anew from their papers, to be measured beside ours."""
