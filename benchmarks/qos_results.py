"""The rows of a stored result of ``qos``, by what they are of."""

from typing import Any

Row = dict[str, Any]
Group = tuple[str, str]

MOVING, MOVES = "moving", "moves"

# Of the few requests of ``generate`` the p99 is the slowest, and says more of the machine.
SHOWN = {"graph": "p99", "generate": "p90"}


class Results:
    """The rows that have latencies. A group is a request and a regime.

    ``moving`` has those of the way that moves, by request and then by what was beside it.
    """

    def __init__(self, report: dict[str, Any]) -> None:
        latencies = [row for row in report["rows"] if row["regime"]]
        rows = [row for row in latencies if row["way"] != MOVING]
        self.groups = _distinct((row["request"], row["regime"]) for row in rows)
        self.ways: list[str] = _distinct(row["way"] for row in rows)
        self.loads: list[str] = _distinct(row["beside"] for row in rows)
        self._rows = {
            (row["request"], row["regime"], row["way"], row["beside"], row[".item()"]): row
            for row in rows
        }
        self.moving: dict[str, dict[str, Row]] = {}
        for row in latencies:
            if row["way"] == MOVING:
                self.moving.setdefault(row["request"], {})[row["beside"]] = row

    def row(self, group: Group, way: str, load: str) -> Row:
        """Return the row without the ``.item()`` loop."""
        row: Row = self._rows[(*group, way, load, "no")]
        return row

    def ratio(self, row: Row) -> float:
        """Return the latency that is shown of the row, to that alone in the first way."""
        alone = self.row((row["request"], row["regime"]), self.ways[0], self.loads[0])
        percentile = SHOWN[row["request"]]
        ratio: float = row[percentile] / alone[percentile]
        return ratio

    def row_with_items(self, group: Group, way: str, load: str) -> Row | None:
        """Return the row with the ``.item()`` loop, if that was measured."""
        return self._rows.get((*group, way, load, "yes"))


def _distinct(values: Any) -> list[Any]:
    return list(dict.fromkeys(values))
