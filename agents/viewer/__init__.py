"""The viewer: which patches a pruned ViT drops on one's own photographs, in a browser or a file."""
