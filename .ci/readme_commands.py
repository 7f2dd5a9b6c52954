"""Print the commands of README.md's bash blocks: all of them, or those of the last block."""

import re
import sys
from pathlib import Path

text = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
print("".join(blocks[-1:] if sys.argv[1] == "last" else blocks[:-1]))
