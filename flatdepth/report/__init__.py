"""Looking at runs: what training sees, and pages about runs side by side."""
