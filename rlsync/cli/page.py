"""``rlsync plan --html``: a price as one HTML file that needs nothing else, with a map of the bytes between hosts.

Owns how it looks; ``pricing`` computes, ``plan`` says it in words. The map is a picture of one pixel a pair of hosts, drawn here, so that
thousands of GPUs make a file of some kilobytes.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Mapping, Sequence
from html import escape

from rlsync.cli.lines import amount, between, milliseconds
from rlsync.cli.prediction import LINKS
from rlsync.cli.pricing import HostTraffic, Price, Quote
from rlsync.plan.links import LINK_NAMES

_MOST_PIXELS, _MOST_CELL, _LEAST_CELL = 768, 24, 2
_COLOUR = (37, 99, 235)
# A pair that exchanges little is told from one that exchanges nothing.
_LEAST_ALPHA = 24
_STYLE = """
:root { color-scheme: light dark; --line: #8883; --soft: #888; --full: rgb(37 99 235); --bad: #c2410c }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem } code { overflow-wrap: anywhere }
table { border-collapse: collapse; width: 100% } th { text-align: left; font-weight: normal; color: var(--soft) }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .8rem .3rem 0; vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
.tiles { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0 } .tiles div { border: 1px solid var(--line); padding: .6rem 1rem }
.tiles b { display: block; font-size: 1.4rem } .soft { color: var(--soft) }
.refused { border-left: 4px solid var(--bad); padding-left: .8rem }
figure { margin: 0; overflow-x: auto } img.map { image-rendering: pixelated; border: 1px solid var(--line); display: block }
.scale { height: 12px; width: 16rem; border: 1px solid var(--line); background: linear-gradient(to right, transparent, var(--full)) }
.ends { display: flex; justify-content: space-between; width: 16rem }
"""


def page(found: Quote, rows: Sequence[tuple[str, str]], command: str, links: Mapping[str, float]) -> str:
    """The whole file.

    Args:
        rows: what the price is, in words.
        command: that was run; links: its speeds, by LINKS, in bytes per second.
    """
    price = found.price
    title = "a plan that is refused" if price is None else f"{price.architecture}, {price.actor_ranks:,} to {price.engine_workers:,} GPUs"
    parts = [f"<h1>{escape(title)}</h1>", f"<p class=soft>A weight sync on paper. <code>{escape(command)}</code></p>"]
    parts += [f"<p class=refused><b>Refused:</b> {escape(refusal)}</p>" for refusal in found.refusals]
    if price is not None:
        parts += [_tiles(price), "<h2>The price</h2>", _table(rows), "<h2>Links</h2>", *_links(price, links)]
        parts += ["<h2>Who gives to whom</h2>", _map(price.host_traffic)]
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{escape(title)}</title><style>{_STYLE}</style>"
    return f"<!doctype html>\n<html lang=en><head>{head}</head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"


def _tiles(price: Price) -> str:
    total = price.bytes_same_gpu + price.bytes_same_host + price.bytes_other_host
    tiles = [(amount(price.tensor_bytes), "of weights"), (amount(total), "are moved in a sync")]
    tiles.append((f"{price.redundancy_per_worker[1]:.2f}", "times what a worker holds reaches it"))
    if price.prediction is not None:
        tiles.append(
            (milliseconds(price.prediction.whole_s), f"from pause to resume, predicted; floor {milliseconds(price.prediction.floor_s)}")
        )
    return "<div class=tiles>" + "".join(f"<div><b>{value}</b>{escape(what)}</div>" for value, what in tiles) + "</div>"


def _links(price: Price, links: Mapping[str, float]) -> list[str]:
    amounts = (price.bytes_same_gpu, price.bytes_same_host, price.bytes_other_host)
    total = sum(amounts) or 1
    rows = [
        f"<tr><td>{escape(link)}<td class=n>{amount(nbytes)}<td class=n>{nbytes / total:.1%}<td class=n>"
        + (f"{links[name] / 1e9:,.0f} GB/s" if name in links else "not said")
        for link, name, nbytes in zip(LINK_NAMES, LINKS, amounts, strict=True)
    ]
    head = "<tr><th>link<th class=n>bytes, in all<th class=n>of all<th class=n>speed, a GPU"
    return [f"<table>{head}{''.join(rows)}</table>"]


def _map(traffic: HostTraffic) -> str:
    """A row for each host of the actor, a column for each of the engines."""
    num_rows, num_columns = len(traffic.actor_hosts), len(traffic.engine_hosts)
    cell = max(_LEAST_CELL, min(_MOST_CELL, _MOST_PIXELS // max(num_rows, num_columns)))
    most = max(map(max, traffic.nbytes))
    values = [[_LEAST_ALPHA + nbytes * (255 - _LEAST_ALPHA) // most if nbytes else 0 for nbytes in row] for row in traffic.nbytes]
    source = base64.b64encode(png(values)).decode()
    pairs = sum(nbytes > 0 for row in traffic.nbytes for nbytes in row)
    words = (
        f"Rows: the actor's {num_rows:,} hosts, from {traffic.actor_hosts[0]} at the top; columns: the engines' {num_columns:,}, from "
        f"{traffic.engine_hosts[0]} at the left. {pairs:,} of {num_rows * num_columns:,} pairs exchange bytes. A host gives "
        f"{between(list(map(sum, traffic.nbytes)))}, and takes {between(list(map(sum, zip(*traffic.nbytes, strict=True))))}."
    )
    picture = f"<img class=map alt='bytes between hosts' width={num_columns * cell} height={num_rows * cell}"
    scale = f"<div class=scale></div><div class='ends soft'><span>0</span><span>{amount(most)}</span></div>"
    return f"<p>{escape(words)}</p><figure>{picture} src='data:image/png;base64,{source}'></figure>{scale}"


def png(alphas: Sequence[Sequence[int]]) -> bytes:
    """A PNG picture of one colour, of this opacity (0 to 255) by row and column."""
    lines = b"".join(b"\0" + b"".join(bytes((*_COLOUR, alpha)) for alpha in row) for row in alphas)
    header = struct.pack(">IIBBBBB", len(alphas[0]), len(alphas), 8, 6, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "<table>" + "".join(f"<tr><th>{escape(name)}<td>{escape(text)}" for name, text in rows) + "</table>"
