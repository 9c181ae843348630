"""How the page looks: quiet colours, white figures, and fonts of the reader's own machine."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ..reporting.signals import SHOWN as BLUE

FONTS = ["Segoe UI", "Roboto", "Helvetica Neue", "Liberation Sans", "DejaVu Sans", "sans-serif"]
"""Names that the reader's machine may know; those of gradio's own themes would be fetched."""

CSS = """
.gradio-container { max-width: 1320px !important; margin: 0 auto !important; }
#title h1 { margin: 0; font-size: 1.5rem; font-weight: 700; }
#title p { margin: 0.2em 0 0; color: #555; }
#message .alert { border-left: 4px solid #D55E00; background: #FDF1E9; color: #5A2800; padding: 10px 14px; }
#verdict .words { border-left: 4px solid #0072B2; background: #EFF6FB; color: #12303F; padding: 10px 14px;
    line-height: 1.5; }
#about a { padding: 0; margin: 0; color: #0072B2; }
#about code { font-size: 0.8rem; }
.plain { overflow-wrap: anywhere; font-size: 0.9rem; line-height: 1.45; color: #444; margin: 0 0 0.5em; }
"""

LIGHT = "() => document.body.classList.remove('dark')"
"""The figures are white, and so is the page, whatever the system prefers."""


def theme() -> Any:
    """Of gradio's plainest, without a font to fetch."""
    plain = gr.themes.Base(primary_hue="sky", neutral_hue="slate", font=FONTS, font_mono=["monospace"])
    return plain.set(
        color_accent=BLUE,
        slider_color=BLUE,
        button_primary_background_fill=BLUE,
        button_primary_background_fill_hover="#005A8C",
    )
