"""What others do, written anew from their papers to be measured beside ours."""
