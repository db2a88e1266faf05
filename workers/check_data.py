"""What the data files of a run tell before it starts: their first rows as text, pictures and tokens, and how many steps they make.

The run reads the rest. Imports neither torch, transformers, Ray, vLLM nor Megatron.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rlsync.errors import ConfigError
from rlsync.models import model_of
from workers.check_report import Report, will_be_made
from workers.config import AnyConfig, RunConfig, SftConfig
from workers.model_folder import check_tokenizer_size, read_hf_config, text_config
from workers.pictures import PictureSizes, open_picture, read_picture_limits
from workers.problems import BadSamples, Problem, load_problems, load_supervised
from workers.reward import unreadable_reference, unreadable_references
from workers.row_files import BadRow, RowFiles, find_files
from workers.sft_rows import Conversation, check_row, conversation, no_eyes, picture_problem, row_form
from workers.validation import unread_validation, validates, validation_notes

_FIRST_ROWS = 200
# Rows of each file whose pictures are opened.
_FIRST_PICTURES = 8
# Lines are counted for the number of steps where a file is not larger than this.
_MAX_COUNTED_BYTES = 2**28
# An array is read as a whole, for which there is no time where a file is larger than this.
_MAX_ARRAY_BYTES = 2**26


def check_data(config: RunConfig, report: Report) -> None:
    """Data files and their first rows, as far as those tell; the run reads the rest."""
    data, bad = config.data, BadSamples()
    report.notes += validation_notes(config, _num_rows(data.val_data_paths, data.val_data_size))
    steps = (_check_picture_rows if data.has_pictures else _check_problems)(config, bad, report)
    form = f"{data.rollout_batch_size} prompts x {config.algorithm.group_size} samples a step"
    report.plan.append(("data", f"{form} from {', '.join(data.train_data_paths)}"))
    if validates(config):
        report.plan.append(("validation", _validation_plan(config)))
    report.plan.append(
        ("steps", "as many as the data has" if steps is None else f"{steps}" if steps == config.runner.max_steps else f"up to {steps}")
    )


def _check_problems(config: RunConfig, bad: BadSamples, report: Report) -> int | None:
    """Text problems; most steps that they make, where that is known."""
    data = config.data
    problems: list[Problem] = []
    for path in (*data.train_data_paths, *data.val_data_paths):
        file = Path(path)
        if file.suffix == ".json" and file.is_file() and file.stat().st_size > _MAX_ARRAY_BYTES:
            report.notes.append(f"{path} is read by the run: an array of that size takes too long here")
        elif not will_be_made(config, file):
            problems += report.take("data", lambda path=path: _first_problems(config, path, bad)) or []
    unreadable = _Asked(problems, config)
    if config.warm_start is not None:
        for path in config.warm_start.data_paths:
            if not will_be_made(config, Path(path)):
                report.take("data", load_supervised, [path], _FIRST_ROWS)
    _check_prompts(config, problems, bad, report)
    for problem in unreadable.problems():
        bad.add(problem.where, unreadable_reference(problem.answers[0]))
    report.notes += report.take("data", bad.settle, data.on_bad_sample) or ()
    steps = _num_steps(config)
    _check_enough(config, problems, bad, steps, report)
    return steps


def _check_picture_rows(config: RunConfig, bad: BadSamples, report: Report) -> int | None:
    """Questions about pictures; most steps that they make, where that is known."""
    data, form = config.data, row_form(config.data)
    problems: list[Problem] = []

    def look(content: Any, where: str) -> Sequence[Any]:
        found = picture_problem(content, form, metadata=config.reward.takes_metadata)
        problems.append(Problem("", found.answers, where))
        return found.images

    num_rows = _check_training_rows(config, look, bad, report, {})
    _check_rows(config, data.val_data_paths, look, bad, report)
    if config.warm_start is not None:
        _check_rows(config, config.warm_start.data_paths, lambda content, where: conversation(content, form).images, bad, report)
    for problem in _Asked(problems, config).problems():
        bad.add(problem.where, unreadable_reference(problem.answers[0]))
    report.notes += report.take("data", bad.settle, data.on_bad_sample) or ()
    num_rows = num_rows if num_rows is None or data.data_size is None else min(num_rows, data.data_size)
    return _steps_of(num_rows, data.rollout_batch_size, "data.rollout_batch_size", config, report)


def check_sft_data(config: SftConfig, report: Report) -> None:
    """Data files of supervised fine-tuning and the first rows of each, as far as those tell; the run reads the rest."""
    data, bad, form = config.data, BadSamples(), row_form(config.data)
    report.notes += unread_validation(config)
    is_blind = report.hf_config is not None and model_of(report.hf_config).vision is None
    texts: dict[str, list[str]] = {}

    def look(content: Any, where: str) -> Sequence[Any]:
        found = check_row(content, form)
        if not isinstance(found, Conversation):
            return ()
        if found.images and is_blind:
            raise BadRow(no_eyes(len(found.images)))
        # Templates may leave out what the assistant thought before its last turn, and nothing else.
        before = [message.text for message in found.messages[:-1] if message.role != "assistant"]
        texts[where] = [*before, found.messages[-1].text]
        return found.images

    sizes: dict[str, PictureSizes] = {}
    num_rows = _check_training_rows(config, look, bad, report, sizes)
    _check_rows(config, data.val_data_paths, look, bad, report, sizes)
    report.notes += report.take("data", bad.settle, data.on_bad_sample) or ()
    _check_lengths(config, texts, sizes, report)
    batch = config.actor.global_batch_size or 1
    # Documents are packed.
    steps = _steps_of(None if data.type == "text" else num_rows, batch, "actor.global_batch_size", config, report)
    report.plan.append(("data", f"{batch} examples a step from {', '.join(data.train_data_paths)}"))
    report.plan.append(("steps", "as many as the data has" if steps is None else f"{steps}"))
    if validates(config):
        answers = ", and answers of the engines" if config.validation.generate else ""
        report.plan.append(("validation", f"loss{answers} on {', '.join(data.val_data_paths)}"))


def _check_lengths(config: SftConfig, texts: Mapping[str, Sequence[str]], sizes: Mapping[str, PictureSizes], report: Report) -> None:
    """Whether rows, by file and line, are longer than ``runner.seq_length`` by their texts and those of their pictures that were opened
    alone, without what a template adds."""
    path = Path(str(config.actor.tokenizer.tokenizer_model)) / "tokenizer.json"
    tokenizer = report.take("tokenizer", _read_tokenizer, path) if texts and path.is_file() else None
    if tokenizer is None:
        return
    num_features = _least_features(config, sizes, report)
    lengths = {
        where: sum(len(row.ids) for row in tokenizer.encode_batch(list(parts), add_special_tokens=False)) + num_features.get(where, 0)
        for where, parts in texts.items()
    }
    limit = config.runner.seq_length
    too_long = [where for where, length in lengths.items() if length > limit]
    if not too_long or (config.data.on_too_long == "skip" and len(too_long) < len(texts)):
        return
    where, count = too_long[0], len(too_long)
    rows = (
        f"all of the first {len(texts)} rows are"
        if count == len(texts)
        else f"{count} of the first {len(texts)} rows {'is' if count == 1 else 'are'}"
    )
    said = f"the texts of {where} alone have {lengths[where]} tokens"
    if where in num_features:
        said = f"texts and pictures of {where} have {lengths[where]} tokens at least, of which {num_features[where]} are of pictures"
    skip = "" if config.data.on_too_long == "skip" or count == len(texts) else "; data.on_too_long=skip leaves such rows out"
    report.found("data", f"{rows} longer than runner.seq_length ({limit}): {said}{skip}")


def _least_features(config: SftConfig, sizes: Mapping[str, PictureSizes], report: Report) -> dict[str, int]:
    """Fewest features that the tower makes of the pictures of rows whose pictures were opened."""
    vision = None if report.hf_config is None else model_of(report.hf_config).vision
    if vision is None:
        return {}
    limits = read_picture_limits(Path(config.model_path), min_pixels=config.data.min_pixels, max_pixels=config.data.max_pixels)
    side = vision.patch_size * vision.spatial_merge_size
    return {where: sum(limits.least_features(size, side) for size in pictures) for where, pictures in sizes.items()}


def _read_tokenizer(path: Path) -> Any:
    """Raises ConfigError."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"no tokenizer can be made from {path}: {error}") from error
    tokenizer.no_truncation()
    return tokenizer


def _check_training_rows(
    config: AnyConfig,
    look: Callable[[Any, str], Sequence[Any]],
    bad: BadSamples,
    report: Report,
    sizes: dict[str, PictureSizes],
) -> int | None:
    """``_check_rows`` of the training files, and what their first rows together say: that none can be used, or that none has a picture."""
    data, before = config.data, len(bad.found)
    fields: dict[str, None] = {}
    num_looked_at, num_seeing = 0, 0

    def look_closer(content: Any, where: str) -> Sequence[Any]:
        nonlocal num_looked_at, num_seeing
        num_looked_at += 1
        fields.update(dict.fromkeys(content if isinstance(content, dict) else ()))
        pictures = look(content, where)
        num_seeing += bool(pictures)
        return pictures

    num_rows = _check_rows(config, data.train_data_paths, look_closer, bad, report, sizes)
    report.picture_sizes += sizes.values()
    num_bad, paths = len(bad.found) - before, ", ".join(data.train_data_paths)
    first = f"the first {num_looked_at} rows of {paths}"
    if num_bad == num_looked_at:
        if num_bad and data.on_bad_sample == "skip":
            where, reason = bad.found[before]
            report.found("data", f"all of {first} are bad samples, which data.on_bad_sample=skip leaves out; {where}: {reason}")
    elif data.image_keys and not num_seeing and not fields.keys() & {*data.image_keys}:
        named, has = (", ".join(map(repr, names)) for names in (data.image_keys, fields))
        report.found(
            "data",
            f"none of {first} has a field that data.image_keys names ({named}); they have {has}. Name the field with pictures; rows "
            "without pictures may have null there",
        )
    elif data.type in ("vlm", "vision_language") and not data.image_keys:
        report.notes.append(f"data.image_keys names no field, so questions are asked without pictures: {paths}")
    return num_rows


def _check_rows(
    config: AnyConfig,
    paths: Sequence[str],
    look: Callable[[Any, str], Sequence[Any]],
    bad: BadSamples,
    report: Report,
    sizes: dict[str, PictureSizes] | None = None,
) -> int | None:
    """Rows of some files together, where that can be known, after a look at the first of each: ``look`` gets a row's content and what to
    call the row, and returns references to its pictures, or raises BadRow. ``sizes`` gets those of pictures that were opened, by row."""
    num_rows: int | None = 0
    for path in paths:
        files = None if will_be_made(config, Path(path)) else report.take("data", find_files, [path])
        if files is not None and sum(file.stat().st_size for file in files if file.suffix != ".parquet") > _MAX_COUNTED_BYTES:
            report.notes.append(f"{path} is read by the run: files of that size take too long here")
            files = None
        rows: RowFiles | None = None if files is None else report.take("data", RowFiles, [path])
        for row in range(0 if rows is None else min(_FIRST_ROWS, len(rows))):
            assert rows is not None
            where, content = rows.read(row)
            try:
                pictures = look(content, where)
                opened = [open_picture(reference, rows.folder(row)).size for reference in pictures if row < _FIRST_PICTURES]
                if opened and sizes is not None:
                    sizes[where] = tuple(opened)
            except BadRow as reason:
                bad.add(where, str(reason))
        num_rows = None if num_rows is None or rows is None else num_rows + len(rows)
    return num_rows


def _steps_of(num_rows: int | None, batch: int, key: str, config: AnyConfig, report: Report) -> int | None:
    """Most steps that so many rows make; None where that is not known before they are read. Too few rows are a finding."""
    most, paths = config.runner.max_steps, config.data.train_data_paths
    if num_rows is not None and num_rows < batch and most != 0 and not report.findings:
        report.found("data", f"Train dataloader is empty! {', '.join(paths)}: {num_rows} rows, fewer than {key} ({batch})")
    steps = None if num_rows is None else config.runner.max_epochs * (num_rows // batch)
    return steps if most < 0 else most if steps is None else min(most, steps)


class _Asked:
    """References that are being tried while other checks go on: math-verify takes a second to be imported."""

    def __init__(self, problems: Sequence[Problem], config: RunConfig) -> None:
        self._problems = problems
        references = [answer for problem in problems for answer in problem.answers] if config.reward.reward_type == "math" else []
        self._pool = ThreadPoolExecutor(1)
        self._asked = self._pool.submit(unreadable_references, references, num_processes=1, timeout_s=config.reward.timeout_s)

    def problems(self) -> Iterator[Problem]:
        """The problems that no response could ever solve."""
        unreadable = self._asked.result()
        self._pool.shutdown()
        return (problem for problem in self._problems if unreadable and unreadable.issuperset(problem.answers))


def _first_problems(config: RunConfig, path: str, bad: BadSamples) -> list[Problem]:
    data = config.data
    return load_problems(
        [path],
        prompt_key=data.prompt_key,
        answer_key=data.answer_key,
        data_size=data.data_size,
        bad=bad,
        rows_per_file=_FIRST_ROWS,
        metadata=config.reward.takes_metadata,
    )


def _check_enough(config: RunConfig, problems: Sequence[Problem], bad: BadSamples, steps: int | None, report: Report) -> None:
    """Whether the training files hold a batch."""
    data = config.data
    files = [Path(path) for path in data.train_data_paths]
    # Behind the file: a line, or the place in an array.
    starts, names = tuple(f"{file}{mark}" for file in files for mark in ":["), ", ".join(data.train_data_paths)
    lost = {where for where, _ in bad.found if where.startswith(starts)}
    left = {problem.where for problem in problems if problem.where.startswith(starts)} - lost
    # With fewer rows than are looked at, these are all.
    are_all_known = len(lost) < _FIRST_ROWS and all(file.is_file() and file.stat().st_size <= _MAX_ARRAY_BYTES for file in files)
    if data.on_bad_sample == "skip" and lost and not left and are_all_known:
        report.found("data", f"all rows of {names} are bad samples, which data.on_bad_sample=skip leaves out: nothing is left to train on")
    elif left and steps == 0 and config.runner.max_steps != 0:
        report.found(
            "data",
            f"Train dataloader is empty! {names}: fewer problems than data.rollout_batch_size ({data.rollout_batch_size}); "
            "lower it, or give more problems",
        )


def _check_prompts(config: RunConfig, problems: Sequence[Problem], bad: BadSamples, report: Report) -> None:
    """What the tokenizer makes of the first prompts that are text."""
    texts = [problem for problem in problems if isinstance(problem.prompt, str)]
    if len(texts) < len(problems) and not config.data.apply_chat_template:
        where = next(problem.where for problem in problems if not isinstance(problem.prompt, str))
        report.found("data", f"{where}: a prompt is a message list: set data.apply_chat_template=True")
    path = Path(str(config.actor.tokenizer.tokenizer_model)) / "tokenizer.json"
    if not texts or not path.is_file():
        return
    tokenizer = report.take("tokenizer", _read_tokenizer, path)
    if tokenizer is None:
        return
    hf_path = Path(config.model_path)
    if (hf_path / "config.json").is_file():
        hf_config = report.take("model", read_hf_config, hf_path, config.model_key) or {}
        size = tokenizer.get_vocab_size(with_added_tokens=False)
        report.take("tokenizer", check_tokenizer_size, size, text_config(hf_config).get("vocab_size"), path.parent)
    encoded = tokenizer.encode_batch([f"{problem.prompt}{config.data.prompt_suffix}" for problem in texts], add_special_tokens=False)
    rows = [encoding.ids for encoding in encoded]
    if not any(rows):
        report.found("tokenizer", "the tokenizer makes no token of any prompt; its files are incomplete, or those of another model")
        return
    for problem, row in zip(texts, rows, strict=True):
        if not row:
            bad.add(problem.where, f"the prompt {str(problem.prompt)[:40]!r} has no tokens")
    shortest, limit = min(map(len, rows)), config.data.max_prompt_length
    if shortest > limit and config.data.filter_prompt_by_length:
        report.found(
            "data",
            f"all of the first {len(rows)} prompts are longer than data.max_prompt_length ({limit}); the shortest has {shortest} tokens",
        )


def _num_steps(config: RunConfig) -> int | None:
    """Most steps that a run can have, or None where that is not known before the data is read."""
    most, data = config.runner.max_steps, config.data
    rows = _num_rows(data.train_data_paths, data.data_size)
    if rows is None:
        return most if most >= 0 else None
    steps = config.runner.max_epochs * (rows // data.rollout_batch_size)
    return steps if most < 0 else min(most, steps)


def _num_rows(names: Sequence[str], most: int | None) -> int | None:
    """Rows that a run takes from some data files, or None where that is not known before it reads them."""
    paths = [Path(name) for name in names]
    if not all(path.is_file() and path.suffix not in (".json", ".parquet") and path.stat().st_size <= _MAX_COUNTED_BYTES for path in paths):
        return None
    rows = 0
    for path in paths:
        with path.open("rb") as stream:
            rows += sum(1 for line in stream if line.strip())
    return rows if most is None else min(rows, most)


def _validation_plan(config: RunConfig) -> str:
    data, runner = config.data, config.runner
    first = ["before the first step"] if runner.val_before_train else []
    every = ["after every step" if runner.val_check_interval == 1 else f"every {runner.val_check_interval} steps and after the last"]
    when = " and ".join(first + (every if runner.val_check_interval > 0 else []))
    limit = "" if data.val_data_size is None else f"the first {data.val_data_size} problems of "
    return f"{when}: one greedy response to {limit or 'each problem of '}{', '.join(data.val_data_paths)}"
