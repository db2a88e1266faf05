"""Claims about what a run leaves on disk and on screen."""

from __future__ import annotations

import io
import json
import math
import os
import resource
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from rlsync.errors import ConfigError, RlsyncError
from tests.deadlines import HANG_S
from tests.ranks import free_port
from tests.unit.test_config import shipped
from workers.config import config_as_dict, load_config
from workers.config.schema import LoggerConfig
from workers.gpus import count_gpus, device_memory_gb
from workers.metrics import host_memory_gb, idle_metrics, largest, rollout_metrics, sample_metrics, speed_metrics
from workers.metrics_log import MetricsLog, check_loggers, find_logger, read_metrics
from workers.samples import Sample
from workers.screen import Screen, summary_rows


def logger_config(folder: Path, *backends: str) -> LoggerConfig:
    return LoggerConfig(log_path=str(folder), experiment_name="x", logger_backends=backends)  # type: ignore[arg-type]


def test_each_step_is_one_complete_line_at_once(tmp_path: Path) -> None:
    with MetricsLog(logger_config(tmp_path), {}) as log:
        written = log.log(1, {"rollout/reward_scores": 0.5, "time/step": 2.0}, training=[{"actor/lr": 1.0}, {"actor/lr": 3.0}])
        assert read_metrics(tmp_path) == [{"step": 1, "rollout/reward_scores": 0.5, "time/step": 2.0, "actor/training/actor/lr": 2.0}]
        assert written["actor/training/actor/lr"] == 2.0
        log.log(2, {"rollout/reward_scores": math.nan})
    assert [line["step"] for line in log.history] == [1, 2]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])["rollout/reward_scores"] is None
    assert (tmp_path / "rewards.png").read_bytes().startswith(b"\x89PNG")


def test_a_logger_that_cannot_be_closed_keeps_no_other_open_and_the_plot_is_drawn(tmp_path: Path) -> None:
    class Logger:
        closed = False

        def log(self, metrics: object, step: int) -> None: ...

        def close(self) -> None:
            self.closed = True
            raise ConnectionError("no network")

    log, loggers = MetricsLog(logger_config(tmp_path), {}), [Logger(), Logger()]
    log._loggers += loggers
    log.log(1, {"rollout/reward_scores": 0.5})
    with pytest.raises(ConnectionError, match="no network"):
        log.close()
    assert all(logger.closed for logger in loggers) and (tmp_path / "rewards.png").is_file()


def test_a_skipped_update_leaves_the_means_to_the_others(tmp_path: Path) -> None:
    with MetricsLog(logger_config(tmp_path), {}) as log:
        updates = [{"actor/grad_norm": math.nan, "actor/update_success": 0.0}, {"actor/grad_norm": 3.0, "actor/update_success": 1.0}]
        written = log.log(1, {}, training=updates)
    assert written == {"actor/training/actor/grad_norm": 3.0, "actor/training/actor/update_success": 0.5}


def test_the_resolved_config_is_written_and_loads_again(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    config = shipped()
    MetricsLog(logger_config(tmp_path), config_as_dict(config)).close()
    assert load_config(OmegaConf.load(tmp_path / "config.yaml")) == config  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("proxy", "written"),
    [
        ("http://me:secret@proxy:3128", "http://***@proxy:3128"),
        ("me:secret@proxy:3128", "***@proxy:3128"),
        ("http://me:sec@ret@proxy", "http://***@proxy"),
        ("http://proxy:3128/a@b", "http://proxy:3128/a@b"),
        (None, None),
    ],
)
def test_the_password_of_a_proxy_is_in_no_file_and_no_logger(proxy: str | None, written: str | None) -> None:
    config = shipped()
    config = replace(config, runner=replace(config.runner, logger=replace(config.runner.logger, wandb_proxy=proxy)))
    assert config_as_dict(config)["runner"]["logger"]["wandb_proxy"] == written
    assert config.runner.logger.wandb_proxy == proxy


def test_a_resumed_run_keeps_the_lines_it_repeats_aside_and_appends(tmp_path: Path) -> None:
    with MetricsLog(logger_config(tmp_path), {"lr": 1}) as log:
        for step in (1, 2, 3, 4):
            log.log(step, {"rollout/reward_scores": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rollou')  # killed while writing
    for number, repeated in ((1, [3, 4]), (2, [3])):
        with MetricsLog(logger_config(tmp_path), {"lr": number + 1}, start_step=2) as log:
            aside = tmp_path / f"metrics.{number}.jsonl"
            (note,) = log.notes
            assert note == f"metrics of steps {repeated[0]} to {repeated[-1]}, which this run repeats, are kept in {aside}"
            assert [json.loads(line)["step"] for line in aside.read_text().splitlines()] == repeated
            log.log(3, {"rollout/reward_scores": 30.0 * number})
        assert [line["rollout/reward_scores"] for line in read_metrics(tmp_path)] == [1.0, 2.0, 30.0 * number]
    configs = [(tmp_path / name).read_text() for name in ("config.yaml.1", "config.yaml.2", "config.yaml")]
    assert configs == ["lr: 1\n", "lr: 2\n", "lr: 3\n"]


def test_a_start_that_fails_for_its_logger_leaves_the_lines_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' * 33)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="names wandb, which cannot be imported"):
        find_logger("wandb")
    with pytest.raises(ConfigError, match="names wandb, which cannot be imported"):
        check_loggers(logger_config(tmp_path, "wandb"))
    with pytest.raises(ConfigError, match="names wandb, which cannot be imported"):
        MetricsLog(logger_config(tmp_path, "wandb"), {})
    assert len(read_metrics(tmp_path)) == 33


def test_a_start_that_fails_for_a_later_logger_or_the_port_hides_no_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard's writer with the step of a resume hides what it repeats, so it is opened when nothing else can fail."""

    class Unreachable:
        def init(self, **options: Any) -> None:
            raise ConnectionError("no network")

    with MetricsLog(logger_config(tmp_path, "tensorboard"), {}) as log:
        log.log(1, {"time/step": 1.0})
    before = sorted(path.name for path in (tmp_path / "tensorboard").iterdir())
    monkeypatch.setitem(sys.modules, "wandb", Unreachable())
    port = free_port()
    config = replace(logger_config(tmp_path, "tensorboard", "wandb"), prometheus_port=port)
    with pytest.raises(ConnectionError):
        MetricsLog(config, {}, start_step=1)
    with socket.create_server(("127.0.0.1", port)), pytest.raises(ConfigError, match="cannot listen"):
        MetricsLog(replace(config, logger_backends=("tensorboard",)), {}, start_step=1)
    assert sorted(path.name for path in (tmp_path / "tensorboard").iterdir()) == before


def test_a_full_disk_is_told_and_leaves_the_lines_before(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = MetricsLog(logger_config(tmp_path), {})
    log.log(1, {"a": 1.0})
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 5, hard))
    try:
        with pytest.raises(RlsyncError, match=r"metrics\.jsonl cannot be written: .*; what was written before is complete"):
            log.log(2, {"a": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]


@pytest.mark.parametrize("line", ["{", '{"step": null}', "[1]", "{}"])
def test_a_line_that_is_no_metrics_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl:2 is no line of metrics"):
        read_metrics(tmp_path)


def test_tensorboard_numbers_optimizer_updates(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(logger_config(tmp_path, "tensorboard"), {}, n_minibatches=2) as log:
        log.log(0, {"val/reward": -1.0})
        for step in (1, 2, 3):
            log.log(step, {"time/step": 1.0}, training=[{"actor/lr": 10.0 * step}, {"actor/lr": 10.0 * step + 1}])
    # What a resumed run repeats is hidden, and nothing else.
    with MetricsLog(logger_config(tmp_path, "tensorboard"), {}, n_minibatches=2, start_step=2) as log:
        log.log(3, {"time/step": 2.0}, training=[{"actor/lr": 35.0}, {"actor/lr": 36.0}])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rates = [(e.step, e.value) for e in events.Scalars("actor/training/actor/lr")]
    assert rates == [(1, 10.0), (2, 11.0), (3, 20.0), (4, 21.0), (5, 35.0), (6, 36.0)]
    assert [(e.step, e.value) for e in events.Scalars("time/step")] == [(2, 1.0), (4, 1.0), (6, 2.0)]
    assert [e.step for e in events.Scalars("val/reward")] == [0]


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_logger_that_is_not_installed_is_named(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"names {name}, which cannot be imported .*pip install {name}"):
        MetricsLog(logger_config(tmp_path, name), {})


def test_loggers_are_imported_only_when_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "swanlab", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    MetricsLog(logger_config(tmp_path), {}).close()


def test_named_loggers_receive_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb and swanlab cannot be reached here; stand-ins with the calls used prove what they are given."""

    class Service:
        def __init__(self) -> None:
            self.seen: list[tuple[str, Any]] = []

        def init(self, **options: Any) -> Service:
            self.seen.append(("init", options))
            return self

        def log(self, metrics: dict[str, float], step: int) -> None:
            self.seen.append(("log", (metrics, step)))

        def finish(self) -> None:
            self.seen.append(("finish", None))

    services = {name: Service() for name in ("wandb", "swanlab")}
    for name, service in services.items():
        monkeypatch.setitem(sys.modules, name, service)
    with MetricsLog(logger_config(tmp_path, "wandb", "swanlab"), {"runner": {"logger_backends": ("wandb",)}}) as log:
        log.log(0, {"val/reward": -1.0})
        log.log(1, {"time/step": 1.0}, training=[{"actor/lr": 2.0}])
    for service in services.values():
        assert [kind for kind, _ in service.seen] == ["init", "log", "log", "finish"]
        assert service.seen[0][1]["project"] == "rlsync" and service.seen[0][1]["config"] == {"runner": {"logger_backends": ["wandb"]}}
        # Each index once: wandb merges what it is given for one twice, and drops what comes to an earlier one.
        assert service.seen[1][1] == ({"val/reward": -1.0}, 0)
        assert service.seen[2][1] == ({"actor/training/actor/lr": 2.0, "time/step": 1.0}, 1)


def test_rollout_metrics_match_hand_computed_values() -> None:
    found = rollout_metrics(prompt_lengths=[4, 6], response_lengths=[1, 3], rewards=[0.0, 1.0], properly_ended=[True, False])
    assert found == {
        "rollout/total_num_sequence": 2.0,
        "rollout/prompt_length": 5.0,
        "rollout/response_length": 2.0,
        "rollout/average_response_length": 2.0,
        "rollout/variance_of_response_length": 1.0,
        "rollout/max_of_response_length": 3.0,
        "rollout/min_of_response_length": 1.0,
        "rollout/total_length": 7.0,
        "rollout/reward_scores": 0.5,
        "rollout/fraction_of_samples_properly_ended": 0.5,
    }


FULL = {
    "rollout/reward_scores": 0.5, "rollout/fraction_of_groups_with_equal_rewards": 0.25, "rollout/response_length": 1234.5,
    "actor/training/actor/final_loss": -0.01234, "actor/training/actor/grad_norm": 1234.5, "rollout/logprob_diff_mean": 1e-7,
    "perf/throughput": 12345.6, "sync/seconds": 12.25, "time/step": 1234.5, "time/sync_weights": 12.3, "time/rollout": 1000.0,
    "rollout/tokens_per_s": 54321.0, "perf/actor_host_memory_gb": 1.5, "perf/engine_host_memory_gb": 2.5,
}  # fmt: skip


def screened(width: int, show: Callable[[Screen], None]) -> list[str]:
    out = io.StringIO()
    with Screen(10_000, console=Console(file=out, width=width)) as screen:
        show(screen)
    return out.getvalue().splitlines()


def test_the_screen_prints_a_line_a_step_under_headings() -> None:
    def show(screen: Screen) -> None:
        screen.step(3, {"rollout/reward_scores": 0.3, "time/step": 2.0})
        screen.step(4, FULL)

    assert screened(200, show) == [
        "       step  reward equal length     loss    grad logp diff  tok/s sync s step s",
        "    3/10000   0.300     -      -        -       -         -      -      -    2.0",
        "    4/10000   0.500   25% 1234.5  -0.0123 1234.50   1.0e-07  12346  12.25 1234.5",
    ]


def test_every_line_fits_80_columns_and_paths_stay_whole(tmp_path: Path) -> None:
    path = "/a/path/of/many/folders/" * 5

    def show(screen: Screen) -> None:
        screen.step(9_999, FULL)
        screen.component("optimizer and checkpoint", 123.4, "150 steps, loss 4.40 -> 1.03")
        screen.note(f'[not markup] {"words and more words " * 20}and {path} at the end\n  File "x.py", line 3')
        screen.summary([{"step": i, **FULL} for i in range(1, 10_000, 100)], Path("/tmp/results"))

    lines = screened(80, show)
    assert [line for line in lines if len(line) > 80] == [f"    {path}"]
    assert '  File "x.py", line 3' in lines and any(line.startswith("[not markup]") for line in lines)


def rows(rewards: Sequence[float], equal: Sequence[float] = ()) -> dict[str, str]:
    history: list[dict[str, float]] = [{"step": i, "rollout/reward_scores": reward} for i, reward in enumerate(rewards, start=1)]
    for line, share in zip(history, equal, strict=False):
        line["rollout/fraction_of_groups_with_equal_rewards"] = share
    return dict(summary_rows(history, Path("x")))


def test_the_summary_compares_steps_that_do_not_overlap() -> None:
    assert rows([0.1, 0.2, 0.3, 0.4, 0.5])["mean reward"] == "0.150 (first 2) -> 0.450 (last 2), +0.300"
    assert rows([0.1, 0.2])["mean reward"] == "0.100 (first 1) -> 0.200 (last 1), +0.100"
    assert rows([i / 10 for i in range(1, 21)])["mean reward"] == "0.300 (first 5) -> 1.800 (last 5), +1.500"
    assert rows([0.1])["mean reward"] == "0.100 (one step)"


def test_the_summary_says_which_steps_had_no_gradient_for_want_of_a_spread_of_rewards() -> None:
    assert rows([0.0] * 4, [0.5, 1.0, 1.0, 0.5])["groups with equal rewards"] == "75%; no gradient in 2 of 4 steps, as all had them"
    assert rows([0.0] * 2, [0.5, 0.0])["groups with equal rewards"] == "25%"


def test_a_summary_of_no_steps_still_says_where_results_are(tmp_path: Path) -> None:
    assert summary_rows([], tmp_path) == [("steps", "0"), ("results", str(tmp_path))]


@pytest.mark.parametrize("name", ["actor/training/actor/update_success", "train/update_success"])
def test_the_closing_summary_says_which_share_of_updates_was_skipped(tmp_path, name):
    def skipped(*shares: float) -> str | None:
        return dict(summary_rows([{"step": n, name: share} for n, share in enumerate(shares, 1)], tmp_path)).get("updates skipped")

    assert skipped(1.0, 1.0) is None
    assert skipped(0.5, 1.0, 0.0) == "50%, as fp16 gradients overflowed"
    assert "100%" in str(skipped(0.0, 0.0)) and "loss_scale never falls" in str(skipped(0.0, 0.0))


def test_groups_with_equal_rewards_and_tokens_a_second_match_hand_computed_values() -> None:
    samples = [Sample((1, 2), (3,) * n, (), True, 0, reward=r) for n, r in ((1, 0.0), (2, 1.0), (3, 1.0), (4, 1.0))]
    found = sample_metrics(samples, 2, 3)
    assert (found["rollout/fraction_of_groups_with_equal_rewards"], found["perf/total_num_tokens"]) == (0.5, 18.0)
    speeds = speed_metrics(found, {"time/step": 3.0, "time/rollout": 2.0}, num_devices=2)
    assert speeds == {"perf/throughput": 3.0, "rollout/tokens_per_s": 5.0}


def test_idle_shares_match_hand_computed_values() -> None:
    """10 s, of which the actor works 4 and engines 5, and both sync 1: of 2 and of 6 devices, or of the same ones."""
    parts = {"step_s": 10.0, "actor_s": 4.0, "generating_s": 5.0, "sync_s": 1.0}
    assert idle_metrics(**parts, actor_share=0.25) == pytest.approx({"perf/idle": 0.425, "perf/actor_idle": 0.5, "perf/engine_idle": 0.4})
    assert idle_metrics(**parts, actor_share=None)["perf/idle"] == pytest.approx(0.0)


def test_memory_of_a_process_counts_its_children_and_those_of_others_once() -> None:
    alone = host_memory_gb()
    code = "x = bytearray(200_000_000); print('up', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"up\n"
        assert alone + 0.15 < host_memory_gb() == pytest.approx(host_memory_gb([child.pid]), abs=0.05)
        assert host_memory_gb([os.getppid()]) > host_memory_gb()
        child.communicate(b"\n")
    assert device_memory_gb("") is None
    assert largest([{"a": 1.0}, {"a": 3.0, "b": 2.0}]) == {"a": 3.0, "b": 2.0}


@pytest.mark.parametrize(("visible", "count"), [(None, 4), ("", 0), ("-1", 0), ("2", 1), ("0,3", 2), ("1,-1,2", 1), ("0,1,2,3,4", 4)])
def test_gpus_are_counted_as_cuda_reads_the_names_of_visible_ones(visible: str | None, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.gpus._gpus", lambda: [80 * 2**30] * 4)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert count_gpus() == count


def fetched(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=HANG_S) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.split() for line in lines if not line.startswith("#"))}


def test_prometheus_is_shown_the_latest_numbers(tmp_path: Path) -> None:
    port = free_port()
    config = replace(logger_config(tmp_path), prometheus_port=port)
    with MetricsLog(config, {}, n_minibatches=2) as log:
        log.log(1, {"sync/gb_per_s": 1.5, "rollout/reward_scores": math.nan}, training=[{"actor/lr": 1.0}, {"actor/lr": 3.0}])
        log.log(2, {"sync/gb_per_s": 2.5}, training=[{"actor/lr": 5.0}])
        numbers = fetched(port)
        assert (numbers["rlsync_sync_gb_per_s"], numbers["rlsync_actor_training_actor_lr"], numbers["rlsync_logged_step"]) == (2.5, 5.0, 4)
        assert math.isnan(numbers["rlsync_rollout_reward_scores"]), "the last that was reported"
        log.show({"sync/engines_dirty": 2})
        assert fetched(port)["rlsync_sync_engines_dirty"] == 2
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2], "what belongs to no step is in no file"
    with pytest.raises(urllib.error.URLError):
        fetched(port)


def test_prometheus_listens_on_loopback_unless_told_otherwise(tmp_path: Path) -> None:
    port = free_port()
    with MetricsLog(replace(logger_config(tmp_path), prometheus_port=port), {}):
        listening = [c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == port]
    assert listening == ["127.0.0.1"]


def test_nothing_listens_unless_asked(tmp_path: Path) -> None:
    def listening() -> set[Any]:
        return {c.laddr for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}

    before = listening()
    with MetricsLog(logger_config(tmp_path), {}) as log:
        log.show({"sync/engines_dirty": 1})
        # What other tests have left may end meanwhile.
        assert listening() <= before


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"runner\.logger\.prometheus_port: cannot listen on 127\.0\.0\.1:{port}"):
            MetricsLog(replace(logger_config(tmp_path), prometheus_port=port), {})


def test_a_missing_prometheus_client_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match="pip install prometheus-client"):
        MetricsLog(replace(logger_config(tmp_path), prometheus_port=free_port()), {})
