"""Claims about the documentation: what it names exists, what it quotes is said, what it computes comes out."""

from __future__ import annotations

import ast
import importlib
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from rlsync.layout.topology import Topology
from rlsync.models import model_of
from rlsync.models.paper import Seat
from rlsync.models.placement import megatron_placements
from rlsync.plan.packing import lay_out
from rlsync.plan.planner import build_plan
from tests.paper import paper_worker
from workers.config import Task, config_table, read_config, register_resolvers

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/**/*.md") for path in ROOT.glob(pattern) if path.is_file()
)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
TOP_FOLDERS = "rlsync|workers|configs|examples|tests|scripts|docs|requirements|benchmarks"
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=NAMES)


def code_blocks(text: str, language: str) -> list[str]:
    return [textwrap.dedent(body) for body in re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)]


def anchor(heading: str) -> str:
    """The fragment that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {anchor(line.lstrip("#")) for line in page.read_text().splitlines() if line.startswith("#")}


def broken_links(page: Path) -> Iterator[str]:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:srcset|src)=\"([^\"]+)\"", text):
        if re.match(r"\w+:", target):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (fragment and fragment not in anchors(file)):
            yield target


def test_the_pages_people_look_for_exist() -> None:
    assert {"README.md", "AGENTS.md", "CONTRIBUTING.md", "docs/troubleshooting.md", "examples/reasoning/README.md"} <= set(NAMES)


@EVERY_PAGE
def test_every_relative_link_and_anchor_exists(page: Path) -> None:
    assert list(broken_links(page)) == []


def test_a_broken_link_would_be_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text('# One thing\n[a](#one-thing) [b](#another) [c](gone.md) [d](https://example.org/gone)\n<img src="gone.svg">\n')
    assert list(broken_links(page)) == ["#another", "gone.md", "gone.svg"]


@EVERY_PAGE
def test_every_path_and_make_target_named_exists(page: Path) -> None:
    text = page.read_text()
    named = set(re.findall(rf"(?<![\w/.-])((?:{TOP_FOLDERS})/[\w./-]*\w\.(?:py|sh|yaml|md|lock|in|override|toml))\b", text))
    assert sorted(path for path in named if not (ROOT / path).exists()) == []
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^ {4}|`)make ([a-z][\w-]*)", text, re.MULTILINE)) <= targets
    for script, folder in (("run_main_grpo_math", "reasoning"), ("run_llm_sft", "sft"), ("run_vlm_sft", "sft")):
        configs = {path.stem for path in (ROOT / "configs" / folder).glob("*.yaml")}
        named = re.findall(rf"{script}\.sh ([a-z][\w.-]+)(?=[\s`])", text)
        assert {name for name in named if "=" not in name} <= configs


@EVERY_PAGE
def test_python_blocks_compile_and_what_they_import_exists(page: Path) -> None:
    for block in code_blocks(page.read_text(), "python"):
        for node in ast.walk(ast.parse(block)):
            # vLLM takes seconds to import, and its parts are imported by other tests.
            if isinstance(node, ast.ImportFrom) and node.module and re.match(r"(rlsync|workers)\b(?!\.engine)", node.module):
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.parametrize(
    ("page", "example"), [("docs/library.md", "sync_engine.py"), ("docs/your-own-trainer.md", "ray_trainer.py")]
)  # fmt: skip
def test_the_library_block_is_the_runnable_file(page: str, example: str) -> None:
    source = (ROOT / "examples/library" / example).read_text()
    regions = re.findall(r"^ *# docs: begin\n(.*?)^ *# docs: end\n", source, re.DOTALL | re.MULTILINE)
    (block,) = code_blocks((ROOT / page).read_text(), "python")
    # Blank lines are the formatter's, which takes the block for a module.
    told, made = block.splitlines(), "".join(map(textwrap.dedent, regions)).splitlines()
    assert list(filter(None, told)) == list(filter(None, made))


def test_the_configuration_table_is_the_generated_one() -> None:
    text = (ROOT / "docs/configuration.md").read_text()
    assert text.endswith(f"\n\n{config_table()}\n"), (
        "docs/configuration.md must end with the output of: python -c 'from workers.config import config_table; print(config_table())'"
    )


@EVERY_PAGE
def test_yaml_blocks_are_configurations_that_load(page: Path) -> None:
    """Blocks that begin with ``defaults``: laid over the base, as hydra does."""
    register_resolvers()
    for block in code_blocks(page.read_text(), "yaml"):
        if block.startswith("defaults:"):
            own = OmegaConf.create(block)
            recipes = [default.recipe for default in own.pop("defaults") if "recipe" in default]
            task: Task = "sft" if "base/sft-megatron" in block else "reasoning"
            folder, name = ("sft", "base/sft-megatron") if task == "sft" else ("reasoning", "base/grpo-megatron")
            with initialize_config_dir(str(ROOT / "configs" / folder), version_base="1.3"):
                base = compose(name)
            OmegaConf.set_struct(base, False)
            under = [OmegaConf.load(ROOT / "configs" / folder / "recipe" / f"{recipe}.yaml") for recipe in recipes]
            assert read_config(OmegaConf.merge(base, *under, own), task).findings == ()


# The front page, in two languages.

ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"


def commands(text: str) -> list[str]:
    """Commands and code of a page, without what is said about them."""
    indented = re.findall(r"^ {4}(.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    lines = indented + [line for block in code_blocks(text, "python") for line in block.splitlines()]
    return [re.sub(r"\s*# .*$", "", line).rstrip() for line in lines]


def tables(text: str) -> list[list[tuple[str, ...]]]:
    """Of each cell of each table what is the same in all languages: names in code, numbers with their units, and links."""
    same = r"`[^`]+`|\d+(?:[.,]\d+)*(?: ?(?:ms|x|GiB|B)\b)?|\]\([^)]+\)"
    found = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [
        [tuple(" ".join(re.findall(same, cell)) for cell in row.strip("|\n").split("|")) for row in table.splitlines()] for table in found
    ]


def links(text: str) -> list[str]:
    """Targets but those within the page and the other language's page."""
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:srcset|src)=\"([^\"]+)\"", text)
    return [target for target in found if not target.startswith(("#", "README"))]


def code_names(text: str) -> list[str]:
    return sorted(re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text))


def headings(text: str) -> list[str]:
    """Levels of the headings, in their order."""
    return re.findall(r"^#+ ", text, re.MULTILINE)


def differences(first: str, second: str) -> list[str]:
    """What of two languages' pages is not the same."""
    parts = {
        "commands": commands,
        "tables": tables,
        "links": links,
        "names": code_names,
        "headings": lambda text: len(re.findall("^#+ ", text, re.M)),
    }
    return [name for name, part in parts.items() if part(first) != part(second)]


def test_the_front_page_is_short_and_says_the_same_in_both_languages() -> None:
    english, chinese = ENGLISH.read_text(), CHINESE.read_text()
    assert len(english.encode()) <= 12 * 1024
    assert commands(english) and tables(english) and links(english)
    assert differences(english, chinese) == []


def test_a_difference_between_the_languages_would_be_found() -> None:
    english = ENGLISH.read_text()
    changed = {
        "make test ": "make tests ",
        "16.1 x": "16.2 x",
        "(docs/sync.md)": "(docs/bench.md)",
        "`hf_model/`": "hf_model",
        "## More": "More",
    }
    for before, after in changed.items():
        assert before in english and differences(english, english.replace(before, after, 1)) != [], before


def test_the_pictures_are_what_the_script_draws() -> None:
    from scripts.draw import drawn

    assert [path.name for path, svg in drawn().items() if not path.is_file() or path.read_text() != svg] == [], (
        "run: python scripts/draw.py"
    )


def test_the_times_beside_others_are_medians_of_the_raw_numbers() -> None:
    from scripts.draw import PANELS, medians

    whole = [medians(file, case)["whole"] for _, rows in PANELS for file, case, _ in rows]
    text = ENGLISH.read_text()
    for place, ours in ((whole[:3], whole[0]), (whole[3:], whole[3])):
        for ms in place:
            shown = [float(n) for n in re.findall(r"([\d.]+) ms", text)]
            assert any(abs(n - ms) <= 0.06 or (n > 100 and abs(n - ms) < 1) for n in shown), ms
            if ms > 100:
                assert any(abs(float(n) - ms / ours) < 0.06 for n in re.findall(r"([\d.]+) x", text)), ms / ours


# The site, and what GitHub shows.


def test_the_site_has_every_page() -> None:
    def pages(entry: object) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for inner in entry.values() if isinstance(entry, dict) else entry:  # type: ignore[attr-defined]
                yield from pages(inner)

    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(pages(navigation)) == sorted(str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md"))


def declared(path: Path) -> set[str]:
    """Names that a module has at its top, imported ones included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def is_documented_name(name: str) -> bool:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        base = ROOT.joinpath(*parts[:length])
        file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        if file.is_file():
            return set(parts[length : length + 1]) <= declared(file)
    return False


def test_api_pages_name_what_exists() -> None:
    names = re.findall(r"^::: (\S+)$", "".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md")), re.MULTILINE)
    assert len(names) > 10 and [name for name in names if not is_documented_name(name)] == []
    assert not is_documented_name("rlsync.bridge.ManualBridge") and not is_documented_name("rlsync.nowhere")


def test_issue_forms_and_the_workflow_are_what_github_reads() -> None:
    forms = [yaml.safe_load(path.read_text()) for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
    assert len(forms) == 2
    for form in forms:
        assert {"name", "description", "body"} <= form.keys()
        assert all({"type", "attributes"} <= entry.keys() for entry in form["body"])
        identifiers = [entry["id"] for entry in form["body"]]
        assert len(set(identifiers)) == len(identifiers)
    assert "rlsync doctor --json" in str(forms)
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert any(step.get("run") == "bash .ci/run" for job in workflow["jobs"].values() for step in job["steps"])


def test_the_image_is_made_from_files_that_are_there() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("COPY") and not (ROOT / line.split()[1]).exists()] == []
    assert any("-r requirements/cuda.lock" in line for line in lines)


# Messages.

VARIES = "…"


def spoken_texts() -> list[str]:
    """Every string in the sources, what a format puts in replaced by ``VARIES``; and the lines of the shell scripts."""
    texts = []
    for path in (p for top in ("rlsync", "workers", "examples") for p in (ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else VARIES for part in node.values))
    scripts = [*(ROOT / "scripts").glob("*.sh"), *(ROOT / "examples").rglob("*.sh")]
    return texts + [line for script in scripts for line in script.read_text().splitlines()]


def is_said(message: str, texts: list[str]) -> bool:
    """Whether some text has the message's fixed parts in their order."""
    pattern = re.compile(".*?".join(re.escape(part.strip()) for part in message.split(VARIES) if part.strip()), re.DOTALL)
    return any(pattern.search(text) for text in texts)


def test_every_message_that_the_troubleshooting_page_quotes_is_one_that_rlsync_says() -> None:
    quoted = re.findall(r"\*\*`(.+?)`\*\*", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    texts = spoken_texts()
    assert len(quoted) > 20
    assert [message for message in quoted if not is_said(message, texts)] == []


def test_a_message_that_nobody_says_would_be_found() -> None:
    texts = spoken_texts()
    assert is_said(f"unknown architecture {VARIES}; supported are", texts)
    assert not is_said(f"unknown architecture {VARIES}; the moon is full", texts)


# Numbers.


def test_one_weights_journey_is_what_the_code_computes() -> None:
    text = " ".join((ROOT / "docs/sync.md").read_text().split())
    model = model_of(
        {
            "architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "torch_dtype": "bfloat16",
        }
    )  # fmt: skip
    name, gate, up = "decoder.layers.2.mlp.linear_fc1.weight", "model.layers.2.mlp.gate_proj.weight", "model.layers.2.mlp.up_proj.weight"
    actors = megatron_placements(model, Topology(tp_size=4, dp_size=2))
    tensors = model.tensors()
    workers = [paper_worker(model, Seat(rank, 2), holder=f"engine 0 worker {rank}") for rank in range(2)]
    plan = build_plan(tensors, actors, workers, bucket_bytes=256 * 2**20)
    bucket_of = {t.name: k for k, bucket in enumerate(plan.buckets) for t in bucket.tensors}
    (shape,) = (b.shape for b in actors[1].buffers if b.name == name)
    assert f"The parameter is {shape}" in text
    assert {(p.tensor, p.box.start[0], p.box.stop[0], p.offset) for p in actors[1].pieces if p.buffer == name} == {
        (gate, 4736, 9472, 0),
        (up, 4736, 9472, 4736 * 3584),
    }
    assert f"{len(tensors)} tensors make {len(plan.buckets)} buckets" in text
    assert (bucket_of[gate], bucket_of[up], len(plan.buckets) - 1) == (2, 2, 14)
    assert [t.name for t in plan.buckets[2].tensors[:2]] == [gate, up]
    taken = max(part.nbytes for row in lay_out(plan) for part in row) / 2**20
    assert f"no worker takes more than {taken} MiB" in text and taken == tensors[0].nbytes / 2 / 2**20
    mib = {t.name: t.nbytes / 2**20 for t in tensors}
    assert mib[gate] == mib[up] and f"({mib[gate] / 2} MiB each for a worker)" in text
    part, _ = lay_out(plan)[2]
    segment = part.segments[0]
    assert (segment.buffer, segment.buffer_offset, segment.shape) == ("model.layers.2.mlp.gate_up_proj.weight", 0, (2 * 9472 * 3584,))
    quarters = {r.source: r for r in part.regions if r.tensor == gate}
    assert sorted(quarters) == [0, 1]
    assert (quarters[1].slot_offset - segment.slot_offset, quarters[1].nbytes, len(quarters[1].shape)) == (33_947_648, 33_947_648, 1)
    assert {r.source for r in part.regions if r.tensor == up} == {4, 5}
