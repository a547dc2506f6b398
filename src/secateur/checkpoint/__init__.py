"""Opening, verifying and writing model folders."""
