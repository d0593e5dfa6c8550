"""`octavo` with ranks that fail on order: `python -m octavo.benchmarks.chaos.faulty_server serve ...`."""

from ...launch import cli, rank_group
from .faulty_rank import FaultyRankActor


def main() -> None:
    assert issubclass(FaultyRankActor, rank_group.RankActor)  # type: ignore[attr-defined]
    rank_group.RankActor = FaultyRankActor  # type: ignore[attr-defined]
    cli.main()


if __name__ == "__main__":
    main()
