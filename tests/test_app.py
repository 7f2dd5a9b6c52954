"""The workbench: what its tabs compute, whom it answers, and its page in a browser."""

import http.client
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from PIL import Image

from flatdepth.cli import parse_config
from flatdepth.config import PasteConfig, TrainConfig
from flatdepth.data.frames import Subset
from flatdepth.errors import BadFrame, UserError
from flatdepth.geometry import pixel_rays
from flatdepth.predict.outputs import Camera, Prediction
from flatdepth.report.preview import preview_rows
from flatdepth.training import loop
from flatdepth.training.stop import ask_to_stop, forget_process, process_of, record_process
from tests.browser import Browser, until
from tests.conftest import REPOSITORY, TinySets

pytest.importorskip("gradio")

from flatdepth.app.augment import DROPPED, Workshop, about, read_frame
from flatdepth.app.compare import Compared, compare, depth_at, flatness, mesh
from flatdepth.app.form import KNOBS, as_yaml, paste_config
from flatdepth.app.networks import Networks
from flatdepth.app.runs import curves, last_sheet, log_tail, run_folders, standing
from flatdepth.commands.serve import main

CPU = torch.device("cpu")
DEMO = str(REPOSITORY / "shards" / "demo_lite0.safetensors")
K_PX = np.array([[100.0, 0, 40], [0, 100.0, 30], [0, 0, 1]])
SMALL = "168 × 224"


@pytest.fixture(scope="module")
def networks() -> Networks:
    return Networks([DEMO], CPU)


# Augment.


def test_panels_are_bit_for_bit_those_of_training(tiny_sets: TinySets) -> None:
    workshop = Workshop([str(tiny_sets.rooms), str(tiny_sets.pictures)], ["nowhere"])
    assert workshop.art == [str(tiny_sets.pictures)]
    assert workshop.sets == [str(tiny_sets.rooms)]
    paste = PasteConfig(share=1.0, max_pastes=3)
    name = str(tiny_sets.rooms)
    for seed in (0, 5):
        config = workshop.config(name, size=SMALL, max_depth_m=20.0, seed=seed, paste=paste)
        frames = workshop.frames(name, None)
        assert isinstance(frames, Subset)
        for row in preview_rows(config, 0, 3):
            place = frames.rows.tolist().index(row.sample.identity)
            own = workshop.row(name, None, place, config)
            for ours, theirs in zip(own.panels(), row.panels(), strict=True):
                np.testing.assert_array_equal(ours, theirs)
            np.testing.assert_array_equal(own.residual, row.residual)
            worst = own.worst()
            assert not worst > 1e-5 and (math.isnan(worst) or f"{worst:.1e}" in about(own))


def test_the_yaml_is_what_train_reads(tiny_sets: TinySets, tmp_path: Path) -> None:
    values = [knob.default for knob in KNOBS]
    assert paste_config(values) == PasteConfig()
    changes = {"content.mirror": 0.25, "area, lowest": 0.05, "max_pastes": 3.0, "depth_test": False,
               "mirror_target": "virtual", "thickness_m, highest": 0.1}  # fmt: skip
    changed = [changes.get(knob.label, knob.default) for knob in KNOBS]
    workshop = Workshop([str(tiny_sets.rooms)], [str(tiny_sets.pictures)])
    for name, chosen in ((str(tiny_sets.rooms), changed), (DROPPED, values)):
        config = workshop.config(
            name, size=SMALL, max_depth_m=80.0, seed=7, paste=paste_config(chosen)
        )
        path = tmp_path / "chosen.yaml"
        path.write_text(as_yaml(config), "utf-8")
        read = parse_config(TrainConfig, [f"--config={path}"], prog="train", description=None)
        assert read == config
    assert "paste" not in yaml.safe_load(as_yaml(config)), "what is as by default is left out"
    with pytest.raises(UserError, match=r"paste\.area: expected two numbers"):
        low = [0.9 if knob.label == "area, lowest" else knob.default for knob in KNOBS]
        paste_config(low)


def test_every_setting_has_a_control_on_whose_places_its_default_lies() -> None:
    fields = {knob.path[0] for knob in KNOBS}
    assert fields == set(PasteConfig.__dataclass_fields__) - {"stages"}
    for knob in KNOBS:
        assert knob.about or knob.part == 1, knob.label
        if knob.bounds is not None:
            places = (knob.default - knob.bounds[0]) / knob.step
            assert places == pytest.approx(round(places), abs=1e-6), knob.label


def test_a_dropped_picture_has_the_depth_that_is_dropped_beside_it(
    tmp_path: Path, networks: Networks
) -> None:
    picture, depth, array = (tmp_path / name for name in ("a.png", "d.png", "d.npy"))
    Image.new("RGB", (80, 60), (150, 140, 130)).save(picture)
    codes = np.linspace(1000, 4000, 30 * 40).reshape(30, 40).astype(np.uint16)
    codes[0, 0] = 0
    Image.fromarray(codes).save(depth)
    settings: dict[str, Any] = {"fov_deg": 60.0, "networks": networks, "name": None}
    frame = read_frame(picture, depth, scale_m=0.001, **settings)
    assert frame.image.shape == (30, 40, 3) and np.isnan(frame.depth_m[0, 0])
    np.testing.assert_allclose(frame.depth_m.ravel()[1:], codes.ravel()[1:] / 1000, rtol=1e-6)
    assert frame.K_px[0, 0] == pytest.approx(20 / math.tan(math.radians(30)))
    np.save(array, np.full((60, 80), 2.5, np.float32))
    assert (read_frame(picture, array, scale_m=0.001, **settings).depth_m == 2.5).all()
    workshop = Workshop([], [])
    config = workshop.config(DROPPED, size=SMALL, max_depth_m=20.0, paste=PasteConfig(share=1.0))
    row = workshop.row(DROPPED, frame, 0, config)
    known = row.depth_m[(row.owner < 0) & np.isfinite(row.depth_m)]
    assert known.min() >= 1 and known.max() <= 4

    np.save(array, np.ones((60, 60), np.float32))
    for bad, match in ((array, "80 × 60 pixels and the depth 60 × 60"), (None, "drop a file of")):
        with pytest.raises(UserError, match=match):
            read_frame(picture, bad, scale_m=0.001, **settings)
    with pytest.raises(BadFrame):
        read_frame(picture, picture, scale_m=0.001, **settings)
    with pytest.raises(UserError, match="drop a picture first"):
        workshop.frames(DROPPED, None)
    found = read_frame(picture, None, scale_m=1.0, **settings | {"name": networks.names[0]})
    assert found.depth_m.shape == (60, 80) and np.isfinite(found.depth_m).any()


# Predict and compare.


def seen(m: list[float], kind: Any = "metric") -> Prediction:
    v, u = np.mgrid[:60, :80] + 0.5
    inverse = (pixel_rays(K_PX, u, v) @ np.array(m)).astype(np.float32)
    return Prediction(
        image=np.zeros((60, 80, 3), np.uint8),
        field=inverse,
        kind=kind,
        camera=Camera(K_px=K_PX, origin="given"),
        blur_px=1.0,
    )


def test_a_plane_is_flat_at_its_angle() -> None:
    both = [seen([0, 0, 0.5]), seen([0.5, 0, 0.5])]
    pair = Compared(
        names=["a", "b"],
        predictions=both,
        depths_m=[one.values for one in both],
        alignments=["none (metric)"] * 2,
    )
    corners = [(10.0, 10.0), (70.0, 12.0), (60.0, 50.0), (12.0, 48.0)]
    before, after = flatness(pair, corners)
    for one, angle in ((before, 0), (after, 45)):
        assert one.relief < 1e-6 and one.rms_mm is not None and one.rms_mm < 1e-2
        assert one.axis_deg == pytest.approx(angle, abs=1e-3)
    assert after.between_deg == pytest.approx(45, abs=1e-3)
    assert depth_at(pair, 39, 30) == "At (39, 30) px: before **2.000 m**, after **2.010 m**"
    assert mesh(pair, 1)[:4] == b"glTF"
    bent = pair.depths_m[1] * (1 + 0.1 * (np.arange(80) // 10 % 2)).astype(np.float32)
    (_, relief) = flatness(replace(pair, depths_m=[pair.depths_m[0], bent]), corners)
    assert relief.relief > 0.03 and relief.worst_mm is not None and relief.worst_mm > 50
    with pytest.raises(UserError, match="at least 3 corners"):
        flatness(pair, corners[:2])
    relative = replace(pair, predictions=[both[0], seen([0.5, 0, 0.5], "relative")])
    assert flatness(relative, corners)[1].rms_mm is None
    with pytest.raises(UserError, match="does not predict metres"):
        mesh(relative, 1)


def test_networks_are_those_that_were_named(tmp_path: Path, networks: Networks) -> None:
    Image.new("RGB", (80, 60), (150, 140, 130)).save(tmp_path / "a.png")
    name = networks.names[0]
    found = compare(networks, (name, name), tmp_path / "a.png", 60, None)
    np.testing.assert_array_equal(*found.depths_m)
    with pytest.raises(UserError, match="choose one that is offered"):
        networks.opened(str(tmp_path / "other.safetensors"))
    with pytest.raises(UserError, match=r"--checkpoint: .*: no such file"):
        Networks([str(tmp_path / "none.safetensors")], CPU)
    with pytest.raises(UserError, match="named twice"):
        Networks([DEMO, DEMO], CPU)


# Runs.


def made_run(folder: Path, steps: int = 40) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"steps": 100, "batch": 8}))
    lines = [
        {"step": n, "loss": 1 / n, "lr": 1e-3, "grad_norm": 1.0, "images_per_s": 4.0,
         "data_wait_share": 0.1}
        for n in range(1, steps + 1)
    ]  # fmt: skip
    (folder / "history.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 4')
    (folder / "pictures").mkdir()
    Image.new("RGB", (8, 6)).save(folder / "pictures" / "000040_step_40.png")
    return folder


WAITING = "import time; print('up', flush=True); time.sleep(600)"


@pytest.fixture
def training() -> Iterator[subprocess.Popen[str]]:
    """A process that stands for a training."""
    command = [sys.executable, "-c", WAITING]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        yield process
        process.kill()


def claim(run: Path, process: int, **changes: Any) -> None:
    own = {
        "pid": process,
        "started": psutil.Process(process).create_time(),
        "host": platform.node(),
    }
    run.with_name(f".{run.name}.process.json").write_text(json.dumps(own | changes))


def test_where_a_run_stands(tmp_path: Path, training: subprocess.Popen[str]) -> None:
    run = made_run(tmp_path / "runs" / "mine")
    (tmp_path / "runs" / "link").symlink_to(run)
    assert list(run_folders(tmp_path / "runs")) == ["mine"] and not run_folders(tmp_path / "none")
    assert standing(run).cells() == ["mine", "stopped", "40 of 100", "0.0250", "4.0", "–", "–"]
    claim(run, training.pid)
    now = standing(run)
    assert now.state == "running" and now.pid == training.pid and now.memory and now.left_s == 120
    assert log_tail(now).splitlines()[-1].startswith("step 40/100  loss 0.0250")
    assert last_sheet(run) is not None and "data:image/svg+xml" in curves(run)
    forget_process(run)
    (run / "metrics.json").write_text('{"finished": true}')
    assert standing(run).state == "finished"
    (run / "history.jsonl").write_bytes(b"\xff\n[]\n{}\n")
    assert standing(run).step == 0


def test_only_the_process_of_a_run_is_asked_to_stop(
    tmp_path: Path, training: subprocess.Popen[str]
) -> None:
    run = tmp_path / "mine"
    for changes in ({"started": 1.0}, {"pid": 0}, {"pid": -1}, {"pid": "x"}, {"pid": 10**30}):
        claim(run, training.pid, **changes)
        assert process_of(run) is None
        with pytest.raises(UserError, match="nothing to stop"):
            ask_to_stop(run)
    claim(run, training.pid, host="elsewhere")
    with pytest.raises(UserError, match="runs on elsewhere"):
        ask_to_stop(run)
    assert training.poll() is None
    claim(run, training.pid)
    assert ask_to_stop(run) == training.pid
    assert training.wait(timeout=30) == -signal.SIGINT
    assert process_of(run) is None
    record_process(run)
    found = process_of(run)
    assert isinstance(found, psutil.Process) and found.pid == os.getpid()


def test_a_training_says_who_it_is_while_it_runs(
    tiny_sets: TinySets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_sets.config(tmp_path)
    config = parse_config(TrainConfig, [f"--config={path}"], prog="train.py", description=None)
    run = Path(config.runs) / config.name

    def look(*_: object) -> dict[str, Any]:
        found = process_of(run)
        assert isinstance(found, psutil.Process) and found.pid == os.getpid()
        with pytest.raises(UserError, match="another training"):
            loop.train(config)
        assert process_of(run) is not None, "the one that was refused leaves it alone"
        return {}

    monkeypatch.setattr(loop, "_train", look)
    loop.train(config)
    assert process_of(run) is None and not list(run.parent.glob(".*.json"))


# The command, and whom its server answers.


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    common = ["--no_browser", "--device", "cpu", "--checkpoint", DEMO]
    for arguments, match in (
        (["--checkpoint", str(tmp_path / "w.pth")], "--checkpoint: .*: no such file"),
        (["--shards", str(tmp_path)], str(tmp_path)),
        (["--port", "70000"], "--port"),
    ):
        with pytest.raises(UserError, match=match):
            main([*common, *arguments])


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of runs that the server offers."""
    folder = tmp_path_factory.mktemp("served") / "runs"
    made_run(folder / "mine")
    yield folder


@pytest.fixture(scope="module")
def address(tiny_sets: TinySets, running: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "flatdepth", "serve", "--no_browser", "--device", "cpu"]
    command += ["--shards", str(tiny_sets.rooms), "--shards", str(tiny_sets.pictures)]
    command += ["--checkpoint", DEMO, "--runs", str(running)]
    opened = {"GRADIO_ALLOWED_PATHS": "/", "GRADIO_SHARE": "true", "GRADIO_ROOT_PATH": "/x"}
    server = subprocess.Popen(
        command,
        env={**os.environ, **opened, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    watch = threading.Timer(240, server.kill)
    watch.start()
    assert server.stdout is not None
    found = re.fullmatch(r"workbench at (\S+) \(Ctrl-C ends\)\n", server.stdout.readline())
    watch.cancel()
    assert found, server.communicate()[1]
    yield found[1]
    server.send_signal(signal.SIGINT)
    out, err = server.communicate(timeout=120)
    assert server.returncode == 0 and "Traceback" not in err + out, err


def ask(address: str, path: str, **headers: str) -> tuple[int, http.client.HTTPMessage, bytes]:
    host, port = re.findall(r"//([\d.]+):(\d+)", address)[0]
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers, content


def test_nobody_else_is_answered_and_no_file_is_served(address: str, running: Path) -> None:
    assert address.startswith("http://127.0.0.1:")
    path = address[address.index("/?") :]
    status, headers, _ = ask(address, path)
    cookie = headers["Set-Cookie"].partition(";")[0]
    assert status == 303 and headers["Location"] == "/" and "HttpOnly" in headers["Set-Cookie"]
    assert ask(address, "/", Cookie=cookie)[0] == 200
    stranger = {"Cookie": cookie[:-1] + "x"}
    for asked, fields, expected in (
        ("/", {}, 401),
        ("/", stranger, 401),
        ("/?key=x", {}, 401),
        ("/config", stranger, 401),
        (path, {"Host": "evil.example"}, 403),
        ("/", {"Cookie": cookie, "Origin": "http://evil.example"}, 403),
        ("/", {"Cookie": cookie, "Origin": "null"}, 403),
    ):
        status, _, content = ask(address, asked, **fields)
        assert status == expected and cookie.encode() not in content, (asked, fields)
    own = [DEMO, running / "mine" / "config.yaml", REPOSITORY / "README.md"]
    for file in ("/etc/hostname", "/proc/self/environ", *own, "../../etc/hostname"):
        for route in ("/gradio_api/file=", "/file="):
            assert ask(address, f"{route}{file}", Cookie=cookie)[0] in (403, 404), file
    config = json.loads(ask(address, "/config", Cookie=cookie)[2])
    assert config["analytics_enabled"] is False and config["max_file_size"] == 1 << 26


# The page.


@pytest.fixture(scope="module")
def browser(address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    browser.open(address)
    yield browser
    browser.close()


def text_of(name: str) -> str:
    return f"document.querySelector('#{name}').innerText"


def turn_to(browser: Browser, tab: str) -> None:
    tabs = "[...document.querySelectorAll('button[role=tab]')]"
    browser.run(f"{tabs}.find(one => one.innerText.trim() === {json.dumps(tab)}).click()")


def drop(browser: Browser, name: str, file: Path) -> None:
    root = browser.call("DOM.getDocument", depth=0)["root"]["nodeId"]
    selector = f"#{name} input[type=file]"
    node = browser.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
    browser.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])


def assert_quiet(browser: Browser) -> None:
    """No error in the console, nothing from elsewhere."""
    errors = [
        event
        for event in browser.complaints()
        if event["method"] == "Runtime.exceptionThrown"
        or event["params"].get("type") == "error"
        or event["params"].get("entry", {}).get("level") == "error"
    ]
    assert not errors
    urls = {
        event["params"]["request"]["url"]
        for event in browser.events
        if event.get("method") == "Network.requestWillBeSent"
    }
    own = re.compile(r"(blob:)?http://127\.0\.0\.1:|data:|chrome:|about:")
    assert not [url for url in urls if not own.match(url)]


def test_a_slider_changes_what_is_seen_and_the_yaml(browser: Browser) -> None:
    until(browser, "document.querySelectorAll('.panel img').length === 4")
    assert "rooms" in browser.run(text_of("augment_about"))
    slide = (
        "(one => { one.value = 0; one.dispatchEvent(new Event('input', {bubbles: true})); })"
        "(document.querySelector('input[type=range][aria-label*=\"share\"]'))"
    )
    browser.run(slide)
    until(browser, f"{text_of('augment_about')}.includes('clean')")
    until(browser, f"{text_of('augment_yaml')}.includes('share: 0.0')")
    browser.run("document.querySelector('#seed_next').click()")
    until(browser, f"{text_of('augment_yaml')}.includes('seed: 1')")
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    assert_quiet(browser)


def test_a_photograph_is_compared(browser: Browser, tmp_path: Path) -> None:
    turn_to(browser, "Compare")
    picture = tmp_path / "photo.png"
    Image.new("RGB", (80, 60), (150, 140, 130)).save(picture)
    until(browser, "document.querySelector('#photograph input[type=file]')")
    drop(browser, "photograph", picture)
    until(browser, "document.querySelector('#clicked img')")
    assert "field of view unknown" in browser.run(text_of("predict_about"))
    box = "document.querySelector('#clicked img').getBoundingClientRect()"
    browser.run("document.querySelector('#clicked img').scrollIntoView({block: 'center'})")
    x, y = browser.run(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({box})")
    for kind in ("mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    until(browser, f"/before [\\d.]+ m, after/.test({text_of('reading')})")
    assert_quiet(browser)


def test_a_run_is_asked_to_stop_only_after_a_question(
    browser: Browser, running: Path, training: subprocess.Popen[str]
) -> None:
    claim(running / "mine", training.pid)
    turn_to(browser, "Runs")
    until(browser, "document.querySelector('#run_state')")
    until(browser, f"{text_of('run_state')}.includes('running')")
    assert "40 of 100" in browser.run(text_of("runs"))
    until(browser, "document.querySelector('#stop')?.offsetParent")
    browser.run("document.querySelector('#stop').click()")
    until(browser, f"document.querySelector('#question') && {text_of('question')}.includes('mine')")
    time.sleep(0.2)
    assert training.poll() is None
    browser.run("document.querySelector('#yes').click()")
    assert training.wait(timeout=60) == -signal.SIGINT
    until(browser, f"{text_of('run_state')}.includes('stopped')")
    assert_quiet(browser)
