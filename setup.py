"Packaging from `settings.ini`, the one place for name, version and requirements."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser()
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
readme = here / "README.md"

# The tested versions travel with the package as an extra, `pip install qlora-lab[tested]`; the doctor reads them.
lines = (here / "constraints.txt").read_text(encoding="utf-8").splitlines()
pins = dict(line.split("==") for line in lines if "==" in line)
tested = [f"{name}=={pins[name]}" for name in (re.split(r"[<>=!~;\[]", r)[0] for r in cfg["requirements"].split())]

setup(
    name=cfg["repo"],
    version=cfg["version"],
    description=cfg["description"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[cfg["lib_name"], cfg["lib_name"] + ".*"]),
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split(), "serve": cfg["serve_requirements"].split(),
                    "compress": cfg["compress_requirements"].split(), "eval": cfg["eval_requirements"].split(),
                    "tested": tested},
    entry_points={
        "console_scripts": cfg["console_scripts"].split("\n"),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
    },
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
)
