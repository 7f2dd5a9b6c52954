"""How things look: colours, contact sheets, curves, the page of a run, clouds to turn."""
