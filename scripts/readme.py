#!/usr/bin/env python3
"""Make README.md from nbs/index.ipynb, running nothing: `python scripts/readme.py`; `--check` only compares.

Text cells as they are, shown code with its stored text, pictures as files under nbs/images. Cells marked `#| hide` stay
out, and so does what stands between `<!-- readme: pause -->` and `<!-- readme: resume -->` in text cells. Links are
rewritten to start at the top folder.
"""
import base64
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- Made from nbs/index.ipynb by scripts/readme.py; edit that notebook. -->"


def relink(text: str) -> str:
    "Links and pictures relative to nbs/ made relative to the top folder; addresses and anchors stay."
    def move(target):
        if re.match(r"[a-z]+:|#|/", target): return target
        return target[3:] if target.startswith("../") else f"nbs/{target}"
    text = re.sub(r"(\]\()([^)\s]+)", lambda m: m[1] + move(m[2]), text)
    return re.sub(r'((?:src|href)=")([^"]+)', lambda m: m[1] + move(m[2]), text)


def readme(root: Path = ROOT) -> tuple[str, dict[Path, bytes]]:
    "(the text, the pictures it shows: path from the top folder to PNG)"
    parts, pictures, paused = [], {}, False
    for cell in json.loads((root / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            for piece in re.split(r"(<!-- readme: (?:pause|resume) -->)", source):
                if piece.startswith("<!-- readme:"): paused = "pause" in piece
                elif piece.strip() and not paused: parts.append(relink(piece.strip()))
        elif paused: continue
        elif cell["cell_type"] == "code" and not re.search(r"^#\| *(hide|export|default_exp)\b", source, re.M):
            notes = dict(re.findall(r'^#\| *([\w-]+): *"?(.*?)"?$', source, re.M))
            code = re.sub(r"^(#\||# NBVAL).*\n?", "", source, flags=re.M).strip()
            if code and notes.get("echo") != "false": parts.append(f"```python\n{code}\n```")
            for output in cell["outputs"]:
                data = output.get("data", {})
                if "image/png" in data:
                    path = Path("nbs/images") / f"index-{len(pictures) + 1}.png"
                    pictures[path] = base64.b64decode("".join(data["image/png"]))
                    parts.append(f"![{notes.get('fig-alt', '')}]({path.as_posix()})")
                    if "fig-cap" in notes: parts.append(f"*{notes['fig-cap']}*")
                elif "text/markdown" in data: parts.append(relink("".join(data["text/markdown"]).strip()))
                else:
                    text = "".join(output.get("text", data.get("text/plain", ""))).rstrip()
                    if text: parts.append(f"```\n{text}\n```")
    (title, *below), *rest = parts[0].split("\n"), *parts[1:]
    about = "\n".join(below).strip()
    return "\n\n".join([title, NOTE, *filter(None, [about]), *rest]) + "\n", pictures


if __name__ == "__main__":
    text, pictures = readme()
    made = {Path("README.md"): text.encode(), **pictures}
    if "--check" in sys.argv:
        stale = [str(p) for p, content in made.items() if not (ROOT / p).exists() or (ROOT / p).read_bytes() != content]
        sys.exit(f"not what nbs/index.ipynb says: {', '.join(stale)}; run python scripts/readme.py" if stale else 0)
    for path, content in made.items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_bytes(content)
