"""The HTTP API as a process of its own: clients, rude clients, signals, the page in a browser."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import psutil
import pytest

import classify_api
from api_server import ServerProcess
from settings import ROOT

CHROMIUM = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    empty = tmp_path_factory.mktemp("nothing")
    with ServerProcess(
        *("--fine-tuned-dir", empty / "none", "--adapters-dir", empty),
        *("--body-timeout-sec", 2, "--deadline-sec", 300),
    ) as server:
        yield server.wait_until_ready()


def connect(server):
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def request_bytes(body, extra="", length=None):
    length = len(body) if length is None else length
    head = (
        "POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n{extra}\r\n"
    )
    return head.encode() + body


BODY = json.dumps({"text": "Best worst thing ever"}).encode()


def status_of(connection):
    received = b""
    while b"\r\n" not in received:
        part = connection.recv(65536)
        if not part:
            break
        received += part
    return received.split(b"\r\n")[0].decode()


def is_well(server):
    return httpx.get(f"{server.url}/classify?text=Good", timeout=60).status_code == 200


def test_it_listens_on_this_machine_alone_and_says_where(server):
    assert server.url.startswith("http://127.0.0.1:")
    assert not any("WARNING listening" in line for line in server.lines)


def test_the_smoke_command_finds_it_well(server):
    result = subprocess.run(
        [ROOT / "test_api.sh", server.url], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("ok ") == 19


def test_the_smoke_command_fails_without_a_server():
    result = subprocess.run(
        [ROOT / "test_api.sh", "http://127.0.0.1:9"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 1 and "FAILED" in result.stdout


@pytest.mark.parametrize("text", ["Best worst thing ever", "100 % & more? 电影 'quoted' \"\\"])
def test_classify_fast_asks_with_curl_alone(server, text):
    result = subprocess.run(
        [ROOT / "classify_fast.sh", text, "base"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "HOWSURE_URL": server.url},
    )
    expected = httpx.get(f"{server.url}/classify", params={"text": text}, timeout=60).json()
    answer = json.loads(result.stdout)
    assert result.returncode == 0
    assert answer["raw_probability"] == pytest.approx(expected["raw_probability"], abs=1e-4)


def test_classify_fast_says_what_failed(server):
    def run(*arguments, url=server.url):
        return subprocess.run(
            [ROOT / "classify_fast.sh", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "HOWSURE_URL": url},
        )

    refused = run("Good", "nope")
    assert refused.returncode == 1 and json.loads(refused.stdout)["status"] == 404
    assert run().returncode == 2
    gone = run("Good", url="http://127.0.0.1:9")
    assert gone.returncode == 1 and "python classify_api.py" in gone.stderr


def test_a_client_that_never_finishes_its_request_is_given_up(server):
    with connect(server) as connection:
        connection.sendall(request_bytes(b'{"text": ', length=1000))
        started = time.monotonic()
        assert " 408 " in status_of(connection)
        assert 1 < time.monotonic() - started < 20
    assert is_well(server)


def test_a_slow_client_delays_nobody(server):
    def drip():
        with connect(server) as connection:
            for byte in request_bytes(BODY):
                connection.sendall(bytes([byte]))
                time.sleep(0.002)
            return status_of(connection)

    with ThreadPoolExecutor(20) as pool:
        slow = [pool.submit(drip) for _ in range(20)]
        assert is_well(server)
        assert all(" 200 " in one.result(60) for one in slow)


def test_clients_that_leave_cost_nothing_and_disturb_nobody(server):
    for _ in range(30):
        with connect(server) as connection:
            connection.sendall(request_bytes(BODY))
    with connect(server) as connection:
        connection.sendall(b"GET /classify?text=a HTTP/1.1\r\nHo")
    assert is_well(server)
    until = time.monotonic() + 30
    while time.monotonic() < until:
        health = httpx.get(f"{server.url}/health", timeout=30).json()
        if health["waiting_rows"] == 0:
            break
        time.sleep(0.05)
    assert health["waiting_rows"] == 0


@pytest.mark.parametrize(
    "raw",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: -1\r\n\r\n",
        b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: 99999999999999999999\r\n\r\n",
        b"GET /classify?text=\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_what_is_hardly_http_gets_a_4xx(server, raw):
    with connect(server) as connection:
        connection.sendall(raw)
        assert status_of(connection).split(" ")[1][:1] == "4"
    assert is_well(server)


def test_requests_sent_ahead_on_one_connection_are_answered_in_order(server):
    texts = [f"text number {i}" for i in range(5)]
    bodies = [json.dumps({"text": text}).encode() for text in texts]
    with connect(server) as connection:
        last = request_bytes(bodies[-1], "Connection: close\r\n")
        connection.sendall(b"".join(request_bytes(b, "") for b in bodies[:-1]) + last)
        received = b""
        while part := connection.recv(65536):
            received += part
    answers = [
        json.loads(part.split(b"\r\n\r\n", 1)[1])["raw_probability"]
        for part in received.split(b"HTTP/1.1 200 OK")[1:]
    ]
    alone = [
        httpx.get(f"{server.url}/classify", params={"text": text}, timeout=60).json()
        for text in texts
    ]
    assert answers == pytest.approx([a["raw_probability"] for a in alone], abs=1e-4)


def test_equal_answers_under_load(server):
    texts = [f"The film was {word}." for word in ("good", "bad", "long", "short", "loud", "fine")]
    with httpx.Client(base_url=server.url, timeout=120) as client:
        batch = client.post("/classify/batch", json={"texts": texts}).json()["answers"]
        expected = [answer["raw_probability"] for answer in batch]

        def ask(i):
            return client.get("/classify", params={"text": texts[i % 6]}).json()["raw_probability"]

        with ThreadPoolExecutor(24) as pool:
            found = list(pool.map(ask, range(120)))
    assert found == pytest.approx([expected[i % 6] for i in range(120)], abs=1e-4)


# The page


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        pytest.skip("there is no chromium with chromedriver; apt-get install chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*CHROMIUM, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    browser = webdriver.Chrome(options, service)
    yield browser
    browser.quit()


def wait_for(condition, timeout_sec=60):
    until = time.monotonic() + timeout_sec
    while not (found := condition()):
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.05)
    return found


def element(browser, name):
    return browser.find_element("id", name)


def test_the_page_shows_what_the_server_answers(server, browser):
    from selenium.webdriver.common.keys import Keys

    browser.set_window_size(1280, 900)
    browser.get(f"{server.url}/ui")
    text = browser.switch_to.active_element  # the text has the focus: the keyboard is enough
    assert text.get_attribute("id") == "text"
    text.clear()
    text.send_keys("A wonderful film.", Keys.CONTROL, Keys.ENTER)
    wait_for(lambda: element(browser, "result").is_displayed())
    expected = httpx.post(
        f"{server.url}/decide", json={"text": "A wonderful film."}, timeout=60
    ).json()
    answer = expected["answer"]
    assert element(browser, "verdict").text.startswith(answer["label"])
    bars = browser.find_elements("css selector", "#picture rect[data-share]")
    shares = [float(bar.get_attribute("data-share")) for bar in bars]
    wanted = [p for p in (answer["raw_probability"], answer["calibrated_probability"]) if p]
    assert shares == pytest.approx(wanted, abs=1e-4)
    assert expected["why"] in element(browser, "decision").text
    assert len(browser.find_elements("css selector", "#tokens tbody tr")) == 8
    assert browser.get_log("browser") == []


def test_the_page_says_what_is_wrong(server, browser):
    browser.get(f"{server.url}/ui")
    element(browser, "text").clear()
    browser.execute_script("document.getElementById('text').value = '   '; ask();")
    wait_for(lambda: "empty" in element(browser, "problem").text)
    assert not element(browser, "result").is_displayed()


def test_the_page_shows_a_text_as_text(server, browser):
    browser.get(f"{server.url}/ui")
    hostile = "<img src=x onerror=\"document.title='hit'\"><|eot_id|>"
    browser.execute_script("document.getElementById('text').value = arguments[0]; ask();", hostile)
    wait_for(lambda: element(browser, "result").is_displayed())
    prompt = browser.execute_script("return document.getElementById('prompt').textContent")
    assert hostile in prompt
    assert browser.title == "How Sure?"


@pytest.mark.parametrize("width", [360, 420, 1000])
def test_the_page_and_its_picture_fit_the_screen(server, browser, width):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 740, "deviceScaleFactor": 2, "mobile": width < 1000},
    )
    try:
        browser.get(f"{server.url}/ui")
        browser.execute_script("ask()")
        wait_for(lambda: element(browser, "result").is_displayed())
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        boxes = browser.execute_script(
            "return [...document.querySelectorAll('#picture text')].map(t => {"
            "const b = t.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; })"
        )
        assert len(boxes) >= 4
        for i, (left, top, right, bottom) in enumerate(boxes):
            assert left >= 0 and right <= width and bottom - top >= 12  # pixels: readable
            for other in boxes[:i]:
                beside = right + 4 <= other[0] or other[2] + 4 <= left
                assert beside or bottom <= other[1] + 4 or other[3] <= top + 4
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


# Starting and stopping


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "--port must lie in 0 to 65535"),
        (["--queue-tokens", "0"], "--queue-tokens must be above 0"),
        (["--log", "everything"], "--log must be requests or texts"),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
        (["--task", "nothing"], "cannot read the task"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_line(arguments, message, capsys):
    assert classify_api.main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_port_in_use_and_a_weak_key_are_refused(server, monkeypatch, capsys):
    port = server.url.rpartition(":")[2]
    assert classify_api.main(["--port", port]) == 1
    assert "choose another --port" in capsys.readouterr().err
    monkeypatch.setenv("HOWSURE_API_KEY", "short")
    assert classify_api.main(["--port", port]) == 1
    assert "at least 16" in capsys.readouterr().err
    monkeypatch.setenv("HOWSURE_PORT", "many")
    with pytest.raises(SystemExit, match="2"):
        classify_api.main([])
    assert "invalid int value" in capsys.readouterr().err


def test_a_server_whose_model_cannot_be_loaded_ends_and_says_why():
    result = subprocess.run(
        [sys.executable, ROOT / "classify_api.py", "--model", "no/such/folder/", "--port", "0"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "no/such/folder" in last
    assert result.stderr.count("error: ") == 2 and "ERROR error: " in result.stderr
    assert "Traceback" not in result.stderr


def test_a_server_ends_with_its_model(tmp_path):
    """What waits then is answered 503, and whoever supervises it sees that it failed."""
    nothing = ("--fine-tuned-dir", tmp_path / "none", "--adapters-dir", tmp_path)
    with ServerProcess(*nothing) as server:
        server.wait_until_ready()
        process = psutil.Process(server.process.pid)
        assert not any("libtorch" in part.path for part in process.memory_maps())
        children = process.children()
        (model,) = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        with ThreadPoolExecutor(8) as pool:
            texts = [f"The film was good. {i}" for i in range(200)]
            asked = [
                pool.submit(httpx.post, f"{server.url}/classify/batch", json={"texts": texts})
                for _ in range(8)
            ]
            wait_for(lambda: httpx.get(f"{server.url}/health").json()["waiting_rows"] > 0)
            model.kill()
            answers = [one.result(60) for one in asked]
        assert {answer.status_code for answer in answers} <= {200, 503}
        assert 503 in {answer.status_code for answer in answers}
        assert server.process.wait(60) == 1
    (last,) = [line for line in server.lines if line.startswith("error: ")]
    assert last == "error: the process of the model has ended (SIGKILL); start the server again"


def test_a_termination_under_load_loses_no_accepted_request(server):
    """Last, since it ends the server. A connection may be refused, or closed before the server has
    read a request; what it has accepted it answers, and the answer arrives."""
    answered, unanswered, stop = [], [], threading.Event()
    before = sum("POST /classify 200" in line for line in server.lines)

    def client():
        with httpx.Client(base_url=server.url, timeout=60) as session:
            while not stop.is_set():
                try:
                    response = session.post("/classify", json={"text": "Best worst thing ever"})
                except httpx.TransportError as error:
                    unanswered.append(error)
                    return
                answered.append(response.status_code)

    threads = [threading.Thread(target=client) for _ in range(24)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(answered) > 50)
    code = server.stop()
    stop.set()
    for thread in threads:
        thread.join(60)
    assert code == 0
    assert set(answered) <= {200, 503}
    (last,) = [line for line in server.lines if "stopped: " in line]
    accepted, sent = (int(word) for word in last.split() if word.isdigit())
    assert accepted == sent >= answered.count(200) > 50
    posted = sum("POST /classify 200" in line for line in server.lines)
    assert posted - before == answered.count(200)  # each answer that was sent has arrived
