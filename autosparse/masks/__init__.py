"""What a mask is: prunable layers, masks, and the choice of which scores to keep."""
