"""Entry point of supervised fine-tuning: hydra in, exit code out. ``--check`` says what is wrong and starts nothing."""

from __future__ import annotations

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))  # also for those who start this file without the script beside it

from rlsync.gc_pause import gc_paused  # noqa: E402
from workers.check import SFT_CHECKS  # noqa: E402
from workers.config import SftConfig  # noqa: E402
from workers.entry import keep_the_screen_for_the_run, main  # noqa: E402
from workers.forked_workers import ForkedEngine, ForkedRank, import_ahead  # noqa: E402
from workers.ray_access import cluster_address, protect_own_cluster  # noqa: E402


def run(config: SftConfig) -> None:
    """A whole run."""
    keep_the_screen_for_the_run()
    protect_own_cluster(cluster_address(config.cluster.num_nodes))
    import_ahead(config.cluster.num_nodes, (ForkedRank, ForkedEngine) if config.has_engines else (ForkedRank,))
    # Only now: importing them takes seconds, and prints; and this imports Ray, for which all has to be set by then.
    with gc_paused(collect_after=False):
        from workers.sft_runner import SftRunner

    SftRunner(config).run()
    if config.pictures is not None:
        from workers.contact_sheet import write_contact_sheet

        sheet = write_contact_sheet(config)
        if sheet is not None:
            print(f"what the saved model answers to held-out pictures: {sheet}")
        else:
            print("no page of answers: no Hugging Face weights were saved, or data.val_data_paths has no questions about a picture")


if __name__ == "__main__":
    sys.exit(
        main(
            sys.argv[1:],
            config_path=REPOSITORY / "configs" / "sft",
            config_name="arithmetic_sft_llm",
            task="sft",
            checks=SFT_CHECKS,
            run=run,
        )
    )
