"""Making what stays train well, and really smaller: repair, orthogonal initialization, TPP, removal, export."""
