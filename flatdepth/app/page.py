"""The whole page, and the server that shows it to this machine alone."""

import errno
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from flatdepth.app import augment, compare, runs
from flatdepth.app.augment import Workshop
from flatdepth.app.events import in_a_sentence
from flatdepth.app.guard import KEY, Guard
from flatdepth.app.networks import Networks
from flatdepth.errors import UserError

UPLOAD_BYTES = 1 << 26
"""Of one dropped file, at most."""
_WAITING = 32
"""Requests that wait for their turn, and pages whose pictures are remembered."""
_KEPT_SECONDS = 3600
"""How long pictures stay that the page showed."""
_FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Arial", "sans-serif")
_MONO = ("ui-monospace", "Menlo", "Consolas", "monospace")
_CSS = """
.gradio-container { max-width: 1500px !important; }
.gradio-container h1 { font-size: 1.35rem; margin: 0.2rem 0 0; }
.dark .on-light, body:not(.dark) .on-dark { display: none; }
.curve { width: 100%; max-width: 62rem; }
.captioned label.float { position: static; width: 100%; border-width: 0 0 1px; border-radius: 0;
  box-shadow: none; padding-right: 4.5rem; white-space: normal; }
.captioned .icon-button-wrapper { z-index: 2; }
.panel .image-container > button, .panel .image-frame, .panel img { width: 100% !important;
  height: auto !important; }
.panel img { image-rendering: pixelated; object-fit: contain !important; }
#clicked img { cursor: crosshair; }
@media (max-width: 760px) { .pictures { order: -1; } }
.tight { align-items: end; flex-wrap: nowrap; gap: 0.4rem; }
#log textarea { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 0.8rem;
  white-space: pre; overflow-x: auto; }
#question { padding: 0.8rem 1rem 0; }
#flatness table { width: 100%; font-variant-numeric: tabular-nums; }
#flatness :is(th, td):not(:first-child) { white-space: nowrap; overflow-wrap: normal;
  word-break: normal; text-align: right; }
"""


def make_page(workshop: Workshop, networks: Networks, folder: Path) -> gr.Blocks:
    """The page; ``folder`` is the directory of the runs."""
    startup: list[Any] = []
    with gr.Blocks(
        title="flatdepth workbench",
        analytics_enabled=False,
        fill_width=True,
        delete_cache=(_KEPT_SECONDS, _KEPT_SECONDS),
    ) as page:
        gr.Markdown("# flatdepth workbench")
        with gr.Tab("Augment"):
            augment.tab(workshop, networks, startup)
        with gr.Tab("Compare"):
            compare.tab(networks)
        with gr.Tab("Runs"):
            runs.tab(folder, startup)
        for answer, inputs, outputs in startup:
            page.load(
                in_a_sentence(answer),
                inputs,
                outputs,
                concurrency_limit=1,
                concurrency_id="compute",
                api_visibility="private",
                show_progress="hidden",
            )
    page.queue(default_concurrency_limit=1, max_size=_WAITING, api_open=False)
    return page


@contextmanager
def served(
    page: gr.Blocks, *, host: str, port: int, share: bool, blocked: list[str]
) -> Iterator[str]:
    """Serve the page and give its address, which holds a secret.

    Args:
        host: address to listen at.
        port: 0 for any that is free.
        share: make Gradio's public link too.
        blocked: folders of which Gradio serves nothing, whatever else allows it.

    Raises:
        UserError: the port cannot be had, or no public link.
    """
    port = _free_port(host, port)
    secret = secrets.token_urlsafe(24)
    names = {"127.0.0.1", "localhost", "::1", host}
    hosts = names if _is_local(host) and not share else None
    page.launch(
        server_name=host,
        server_port=port,
        share=share,
        inbrowser=False,
        prevent_thread_lock=True,
        quiet=True,
        show_error=False,
        allowed_paths=[],
        blocked_paths=blocked,
        max_file_size=UPLOAD_BYTES,
        state_session_capacity=_WAITING,
        enable_monitoring=False,
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        num_workers=0,
        footer_links=[],
        app_kwargs={"middleware": [Middleware(Guard, secret=secret, hosts=hosts)]},
        theme=_theme(),
        css=_CSS,
    )
    try:
        if share and not page.share_url:
            raise UserError("--share: Gradio's public link cannot be had; leave the option out")
        shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        url = page.share_url or f"http://{f'[{shown}]' if ':' in shown else shown}:{port}/"
        yield f"{url.rstrip('/')}/?{KEY}={secret}"
    finally:
        page.close(verbose=False)


def _theme() -> gr.themes.Base:
    """Fonts of the viewer's machine, and notes that can be read."""
    theme = gr.themes.Default(primary_hue="blue", font=list(_FONT), font_mono=list(_MONO))
    return theme.set(
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300"
    )


def _free_port(host: str, port: int) -> int:
    try:
        family = socket.getaddrinfo(host, port)[0][0]
        with socket.socket(family) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((host, port))
            return int(trial.getsockname()[1])
    except socket.gaierror as error:
        raise UserError(
            f"--host: {host} is no address of this machine ({error.strerror})"
        ) from error
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise UserError(f"--host: {host} is no address of this machine") from error
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise UserError(
            f"--port: {port} cannot be had ({error.strerror}); take another, or leave it out"
        ) from error


def _is_local(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
