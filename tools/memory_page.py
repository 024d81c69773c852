"""The HTML page of the memory map: style, script and text.

The page is also well-formed XML, so that tools can extract the pictures.
"""

from __future__ import annotations

from html import escape

from symmem.tools.display import PALETTE
from symmem.version import VERSION

__all__ = ["cut", "page", "text"]

_STYLE = """
:root{color-scheme:light dark;--page:#fff;--text:#1d2129;--faint:#687080;--line:#dcdfe5;
--empty:#f0f2f5;--mark:#c2185b;--solid:#8f97a5}
@media(prefers-color-scheme:dark){
:root{--page:#15181d;--text:#e4e7ec;--faint:#98a1b0;--line:#323842;
--empty:#21262e;--mark:#ff7aa8;--solid:#7a8494}}
body{font:14px/1.45 system-ui,sans-serif;background:var(--page);color:var(--text);max-width:1100px;margin:24px auto;
padding:0 20px}
h1{font-size:22px;margin:0 0 2px} h2{font-size:14px;margin:24px 0 8px;font-weight:600}
h2 small{font-weight:400;font-size:12px;color:var(--faint);margin-left:14px}
p,.faint{color:var(--faint);margin:0 0 10px} a{color:inherit}
details{border-top:1px solid var(--line);padding:14px 0;margin-top:18px}
summary{font-size:16px;font-weight:600;cursor:pointer}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th{font-weight:400;color:var(--faint);text-align:left} th,td{padding:3px 14px 3px 0;white-space:nowrap}
.wide{overflow-x:auto} .n{text-align:right} td.w{width:100%;overflow-wrap:anywhere;white-space:normal;padding-right:0}
.figures{display:flex;flex-wrap:wrap;gap:4px 34px;margin-top:10px}
.figures b{display:block;font-size:18px;font-weight:600} .figures span{color:var(--faint);font-size:12px}
svg{display:block;width:100%;height:auto} svg.key{width:14px;height:14px;display:inline-block;vertical-align:-2px}
svg.bar{width:150px;height:12px}
svg text{font:11px system-ui,sans-serif;fill:var(--faint)} svg text.on{fill:#000;pointer-events:none}
text.end{text-anchor:end} text.mid{text-anchor:middle} svg text.mark{fill:var(--mark)}
.empty{fill:var(--empty)} .grid{stroke:var(--line);fill:none} .grow{stroke:var(--mark);stroke-dasharray:2 3}
.edge{stroke:var(--page);stroke-width:.6} .outline{fill:none;stroke:var(--text);stroke-width:1.3}
.solid{fill:var(--solid)} .late{fill:url(#hl)}
#tip{position:fixed;pointer-events:none;background:var(--text);color:var(--page);padding:6px 9px;border-radius:5px;
font-size:12px;white-space:pre-line;max-width:420px;overflow-wrap:anywhere}
tr[data-c]{cursor:default} tr[data-c]:hover td{background:var(--empty)}
"""

_SCRIPT = """
for (const title of document.querySelectorAll("svg title")) {
  title.parentNode.dataset.tip = title.textContent;
  title.remove();
}
const tip = document.getElementById("tip");
addEventListener("mousemove", (event) => {
  const at = event.target.closest("[data-tip]"), row = event.target.closest("[data-c]");
  tip.hidden = !at;
  if (row) document.body.dataset.only = row.dataset.c; else delete document.body.dataset.only;
  if (!at) return;
  tip.textContent = at.dataset.tip;
  tip.style.left = Math.max(0, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)) + "px";
  tip.style.top = Math.max(0, Math.min(event.clientY + 16, innerHeight - tip.offsetHeight - 8)) + "px";
});
"""


def page(subtitle: str, body: str) -> str:
    """Make the HTML file. ``subtitle`` is text, ``body`` is HTML."""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/><meta name="viewport" content="width=device-width"/>
<title>Memory map - symmem</title><style>{_STYLE}{_colours()}</style></head><body>
<svg width="0" height="0" style="position:absolute"><defs>{_hatchings()}</defs></svg>
<h1>Memory map</h1><p>{text(subtitle)}</p>
{body}
<div id="tip" hidden="hidden"></div><script>{_SCRIPT}</script><!-- symmem {VERSION} --></body></html>
"""


def text(value: object, limit: int = 120) -> str:
    """Escape ``value`` for HTML, cut by :func:`cut`. Unprintable characters except line feeds are replaced."""
    shown = cut(str(value), limit)
    return escape("".join(each if each.isprintable() or each == "\n" else "\ufffd" for each in shown))


def cut(value: str, limit: int = 120) -> str:
    """Remove the middle of ``value`` if it is longer than ``limit`` characters (at least 3)."""
    if len(value) <= limit:
        return value
    head = limit // 3
    return f"{value[:head]}\u2026{value[head + 1 - limit :]}"  # keep more of the end: file, line and function


def _colours() -> str:
    rules = [f".c{number}{{fill:{colour}}} .h{number}{{fill:url(#h{number})}}" for number, colour in enumerate(PALETTE)]
    rules += [
        f'[data-only="{number}"] svg .b:not(.c{number}):not(.h{number}){{opacity:.12}}'
        for number in range(len(PALETTE))
    ]
    return "\n".join(rules)


def _hatchings() -> str:
    names = {f"h{number}": f"c{number}" for number in range(len(PALETTE))} | {"hl": "solid"}
    return "".join(
        f'<pattern id="{name}" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        f'<rect class="{fill}" width="5" height="5" opacity=".25"/><rect class="{fill}" width="2" height="5"/>'
        "</pattern>"
        for name, fill in names.items()
    )
