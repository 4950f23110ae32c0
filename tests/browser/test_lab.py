"""A lesson in a real JupyterLab in a real Chromium: all cells run, and sliders move pictures.

Everything happens in a temporary copy with a temporary home, on the loopback address. Pictures and times are left in `out/browser`.
Another lesson: WSL_NB_BROWSER_BOOK=16_widgets.ipynb python -m pytest -s tests/browser
"""
import importlib.util, json, os, re, secrets, shutil, signal, socket, statistics, subprocess, sys, time, urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / 'out' / 'browser'
BOOK = os.environ.get('WSL_NB_BROWSER_BOOK', '02_more.ipynb')
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
SECONDS = 360  # for everything
MOVES = 6  # of each slider
FLAGS = ['--no-sandbox', '--disable-dev-shm-usage', '--disable-gpu', '--disable-background-networking', '--disable-component-update',
         '--no-first-run', '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1']

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason='no Chromium on this machine'),
              pytest.mark.skipif(importlib.util.find_spec('playwright') is None, reason='playwright is not installed')]
CELLS = 'const cells = window.jupyterapp.shell.currentWidget.content.model.cells, all = [...Array(cells.length).keys()].map(i => cells.get(i).toJSON());'


class Clock:
    "What is left of the time, in milliseconds for playwright."
    def __init__(self): self.start = time.monotonic()
    def spent(self): return time.monotonic() - self.start
    def left(self, most=SECONDS): return max(1, 1000 * min(most, SECONDS - self.spent()))


@pytest.fixture
def clock(): return Clock()


@pytest.fixture
def lab(tmp_path, clock):
    "Address, token and log of a JupyterLab whose root is a copy of what a lesson reads; autosave cannot reach the repository."
    root, home, log = tmp_path / 'root', tmp_path / 'home', tmp_path / 'lab.log'
    for part in ('nbs', 'results', 'tests', 'wsl_nb'):
        shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', '.last_checked'))
    settings = home / 'settings' / '@jupyterlab' / 'apputils-extension'; settings.mkdir(parents=True)
    (settings / 'notification.jupyterlab-settings').write_text('{"fetchNews": "false", "checkForUpdates": false}')
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    url, token = f'http://127.0.0.1:{port}', secrets.token_hex(16)
    env = {k: v for k, v in os.environ.items() if not k.startswith(('JUPYTER', 'PYTEST', 'COV')) and k not in ('MPLBACKEND', 'IN_TEST')}
    env |= dict(HOME=str(home), JUPYTERLAB_SETTINGS_DIR=str(home / 'settings'), JUPYTERLAB_WORKSPACES_DIR=str(home / 'workspaces'), OMP_NUM_THREADS='1', PYTHONPATH=str(root))
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}', '--ServerApp.port_retries=0',
               f'--IdentityProvider.token={token}', f'--ServerApp.root_dir={root}', '--LabApp.expose_app_in_browser=True']
    with open(log, 'w') as f: server = subprocess.Popen(command, cwd=root, env=env, stdout=f, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait_for(f'{url}/api?token={token}', server, log, clock)
        yield url, token, log
    finally:
        server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: os.killpg(server.pid, signal.SIGKILL); server.wait()


def wait_for(url, server, log, clock):
    "Returns when the server answers."
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while clock.spent() < 90:
        assert server.poll() is None, f'JupyterLab ended with {server.returncode}:\n{log.read_text()[-2000:]}'
        try:
            with opener.open(url, timeout=2): return
        except OSError: time.sleep(.2)
    pytest.fail(f'JupyterLab does not answer:\n{log.read_text()[-2000:]}')


@pytest.fixture
def page(lab, clock):
    "A page without anything on it; `faults` collects its errors, `strangers` the addresses outside of this machine that it asked for, `watch` and `log` come along."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        try:
            page = browser.new_page(viewport=dict(width=1400, height=1000))
            page.faults, page.strangers, page.unfinished, page.watch, page.log = [], [], True, clock, lab[2]
            page.on('pageerror', lambda e: page.faults.append(str(e)))
            page.on('request', lambda r: re.match(r'(https?|wss?)://(?!127\.0\.0\.1[:/])', r.url) and page.strangers.append(r.url))
            yield page
            if page.unfinished: page.screenshot(path=str(OUT / 'failed.png'))
        finally: browser.close()


def report(page):
    "Why it did not go on: kernel, the cell that runs, the server's last words."
    state = page.evaluate('''() => { const w = window.jupyterapp?.shell?.currentWidget; if (!w?.content?.model) return 'no notebook is open';
        ''' + CELLS + '''const busy = w.content.widgets.findIndex(c => c.model.type === 'code' && c.prompt === '*');
        return {kernel: w.sessionContext?.session?.kernel?.status, run: all.filter(c => c.execution_count).length, cells: all.length,
                waiting: busy, source: busy < 0 ? '' : all[busy].source.slice(0, 300)}; }''')
    return f'{json.dumps(state, indent=1)}\npage errors: {page.faults}\n{page.log.read_text()[-1500:]}'


def wait(page, what, script, most, **given):
    "Waits until the script is true, `most` seconds at most; fails with a report."
    try: page.wait_for_function(script, timeout=page.watch.left(most), **dict(polling=250) | given)
    except Exception as e:
        pytest.fail(f'{what}: {type(e).__name__}\n{report(page)}')


def run_all(page):
    "Runs every cell; a promise that never ends would outlive every time-out, so its end is noted in the page."
    page.evaluate('''() => { window.ended = null; window.jupyterapp.commands.execute('notebook:run-all-cells').then(
        r => window.ended = ['done', r], e => window.ended = ['failed', String(e)]); }''')
    wait(page, 'the cells did not end', '() => window.ended', SECONDS)
    errors = page.evaluate('() => {' + CELLS + '''return all.flatMap((c, i) => (c.outputs || []).filter(o => o.output_type === 'error').map(o => [i, o.ename, o.evalue, c.source.slice(0, 200)])); }''')
    assert not errors, '\n'.join(map(str, errors))
    unrun = page.evaluate('() => {' + CELLS + '''return all.map((c, i) => [i, c]).filter(([i, c]) => c.cell_type === 'code' && c.source.trim() && !c.execution_count).map(([i]) => i); }''')
    assert not unrun, f'cells {unrun} did not run'


def explorers(page):
    "Yields the outputs with controls from the top, each scrolled into view (a long notebook only holds what is near the window) and drawn."
    holding = page.evaluate('() => {' + CELLS + '''return all.flatMap((c, i) => (c.outputs || []).some(o => o.data?.['application/vnd.jupyter.widget-view+json']) ? [i] : []); }''')
    for i in holding:
        page.evaluate('''i => { const book = window.jupyterapp.shell.currentWidget.content; book.activeCellIndex = i; book.scrollToItem(i, 'start');
            book.widgets[i].node.setAttribute('data-at', i); }''', i)
        cell = page.locator(f'[data-at="{i}"]')
        cell.locator('.jupyter-widgets').first.wait_for(timeout=page.watch.left(20))
        wait(page, f'a picture of cell {i} is not drawn', 'i => [...document.querySelectorAll(`[data-at="${i}"] img`)].every(m => m.complete && m.naturalWidth)', 20, arg=i)
        broken = cell.locator('.jupyter-widgets-error-widget')
        if broken.count(): broken.first.click(); pytest.fail(f'a widget of cell {i} has no view: {broken.first.inner_text()[:500]}')
        yield cell


def settled(picture):
    "Pixels of a picture once two looks in a row agree."
    before = None
    for _ in range(20):
        if (now := picture.screenshot()) == before: return now
        before = now
    pytest.fail('the picture never comes to rest')


def move(page, slider, picture, key):
    "One key press; milliseconds until the new picture is decoded. Read-out and pixels must have changed."
    said, seen = slider.locator('.widget-readout').inner_text(), settled(picture)
    slider.locator('.noUi-handle').focus()
    picture.evaluate('''img => { window.took = null; let start = null;
        document.addEventListener('keydown', () => start = performance.now(), {once: true, capture: true});
        img.addEventListener('load', () => window.took = performance.now() - start, {once: true}); }''')
    page.keyboard.press(key)
    wait(page, f'no new picture after {key} on {slider.inner_text()!r}', '() => window.took !== null', 15, polling=20)
    took, now = page.evaluate('window.took'), slider.locator('.widget-readout').inner_text()
    assert now != said, f'the read-out stays at {said}'
    if settled(picture) == seen: pytest.fail(f'the picture stays the same from {said} to {now}')
    return took


def play(page, slider, number):
    "Moves a slider there and back by keyboard, with a screenshot before and after; milliseconds of each move."
    name = slider.locator('.widget-label').inner_text()
    slider.scroll_into_view_if_needed()
    box = slider.locator('xpath=ancestor::*[contains(concat(" ", @class, " "), " widget-vbox ")][.//img][1]')
    picture, handle = box.locator('img').last, slider.locator('.noUi-handle')
    picture.wait_for(timeout=page.watch.left(20))
    shot = lambda when: page.screenshot(path=str(OUT / f'{number}_{re.sub("[^a-z0-9]+", "_", name.lower())}_{when}.png'))
    value = lambda edge: float(handle.get_attribute(f'aria-value{edge}'))
    shot('before')
    assert value('min') < value('max'), f'slider {name} has nowhere to go'
    times, step = [], 1
    for k in range(MOVES):
        if value('now') >= value('max'): step = -1
        elif value('now') <= value('min'): step = 1
        times.append(move(page, slider, picture, 'ArrowRight' if step > 0 else 'ArrowLeft'))
        if k == 0: shot('after')
    return name, times


def test_lesson_runs_and_sliders_move_pictures(lab, page, clock, record_property):
    url, token, _ = lab
    shutil.rmtree(OUT, ignore_errors=True); OUT.mkdir(parents=True)
    page.goto(f'{url}/lab/tree/nbs/{BOOK}?reset&token={token}', wait_until='domcontentloaded', timeout=clock.left(60))
    page.wait_for_selector('.jp-Notebook .jp-Cell', timeout=clock.left(60))
    wait(page, 'no idle kernel', "() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'", 90)
    seconds = dict(ready=clock.spent()); run_all(page); seconds['cells ran'] = clock.spent()
    moved = []
    for cell in explorers(page):
        for slider in cell.locator('.widget-slider, .widget-hslider').all()[:2 - len(moved)]: moved.append(play(page, slider, len(moved) + 1))
    assert len(moved) == 2, f'{len(moved)} sliders in {BOOK}'
    assert not page.faults and not page.strangers, (page.faults, page.strangers)
    seconds['all'] = clock.spent()
    page.unfinished = False
    found = dict(book=BOOK, seconds={k: round(s, 1) for k, s in seconds.items()}, milliseconds={n: dict(median=round(statistics.median(t)), all=[round(x) for x in t]) for n, t in moved})
    (OUT / 'moves.json').write_text(json.dumps(found, indent=1) + '\n')
    record_property('browser', found); print(f'\n{json.dumps(found)}')
