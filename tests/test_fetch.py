"Downloads against a server of our own on the loopback address, and archives that try to escape."
import hashlib, io, itertools, json, os, re, shutil, subprocess, sys, tarfile, threading, time, zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from wsl_nb import fetch as F, fetch_archive as A
from wsl_nb.core import BadInput, rng

BYTES = rng('fetch').bytes(300_000)
RIGHT = 'sha256:' + hashlib.sha256(BYTES).hexdigest()


class Server(ThreadingHTTPServer):
    "Sends `data` with the manners of its fields; `asked` is the log of (path, Range, If-Range)."
    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.data, self.tag, self.ranges, self.obeys_if_range, self.length = BYTES, '"one"', True, True, True
        self.cuts, self.codes, self.stalls, self.pace, self.asked, self.closing = [], [], 0, 0, [], threading.Event()
        self.url = f'http://127.0.0.1:{self.server_port}'

    def handle_error(self, *_): pass  # a client that goes away is what these tests are about


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_): pass

    def do_GET(self):
        s, wanted, only_if = self.server, self.headers.get('Range'), self.headers.get('If-Range')
        s.asked.append((self.path, wanted, only_if))
        if s.codes and (code := s.codes.pop(0)) != 200: return self.send_error(code)
        if self.path.startswith('/moved'):
            self.send_response(302); self.send_header('Location', self.path[6:]); return self.end_headers()
        start = int(re.fullmatch(r'bytes=(\d+)-', wanted)[1]) if wanted and s.ranges and (only_if in (None, s.tag) or not s.obeys_if_range) else 0
        if start >= len(s.data): return self.send_error(416)
        self.send_response(206 if start else 200)
        if start: self.send_header('Content-Range', f'bytes {start}-{len(s.data) - 1}/{len(s.data)}')
        if s.tag: self.send_header('ETag', s.tag)
        if s.length: self.send_header('Content-Length', str(len(s.data) - start))
        self.end_headers()
        body = s.data[start:][:s.cuts.pop(0) if s.cuts else None]
        if s.stalls: s.stalls -= 1; self.wfile.write(body[:1000]); self.wfile.flush(); s.closing.wait(20); return
        for i in range(0, len(body), 10_000): self.wfile.write(body[i:i + 10_000]); s.pace and time.sleep(s.pace)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    s = Server(); thread = threading.Thread(target=s.serve_forever, kwargs=dict(poll_interval=.02), daemon=True); thread.start()
    yield s
    s.closing.set(); s.shutdown(); s.server_close()


@pytest.fixture
def get(server, tmp_path):
    "Downloads from the server into x.bin; `said` collects the lines."
    def call(path='/x.bin', hash=RIGHT, **given):
        return F.download(server.url + path, tmp_path / 'x.bin', hash, **dict(pause=.01, timeout=5, say=call.said.append) | given)
    call.said = []
    return call


def names(folder): return sorted(p.name for p in Path(folder).iterdir())
def starts(server): return [int(r[6:-1]) if r else 0 for _, r, _ in server.asked]


# --- sources ---------------------------------------------------------------------------------------------------------

def test_torchvision_tells_three_sources_and_the_network_is_not_touched(monkeypatch):
    import socket
    monkeypatch.setattr(socket.socket, 'connect', lambda *_: pytest.fail('a connection'))
    files = {n: s.files for n, s in F.sources().items() if s.files}
    assert {n: len(f) for n, f in files.items()} == dict(voc=1, sbd=1, pet=2)
    for remote in sum(files.values(), ()):
        assert re.fullmatch(r'md5:[0-9a-f]{32}', remote.hash) and remote.url.startswith('https://') and remote.url.endswith('/' + remote.name)


def test_source_that_torchvision_no_longer_tells_is_by_hand(monkeypatch, tmp_path):
    from torchvision.datasets import oxford_iiit_pet
    monkeypatch.delattr(oxford_iiit_pet.OxfordIIITPet, '_RESOURCES')
    with pytest.raises(BadInput, match='no longer tells'): F.fetch('pet', tmp_path)
    assert F.sources()['voc'].files and names(tmp_path) == []


@pytest.mark.parametrize('name', [s.name for s in F._BY_HAND])
def test_by_hand_says_where_and_what_then(name, tmp_path):
    with pytest.raises(BadInput) as e: F.fetch(name, tmp_path)
    source = F.sources()[name]
    assert source.home in e.value.cure and source.note in e.value.cure and 'checksum not known' in e.value.cure
    assert not source.layout or f'wsl-nb data check {source.layout}' in e.value.cure


def test_layouts_are_readable():
    from wsl_nb.formats import find_root
    for layout in {s.layout for s in F.sources().values()} - {''}:
        with pytest.raises(BadInput, match=f'in the {layout} layout'): find_root('/nowhere', layout)


def test_no_address_stands_in_the_code():
    for module in F, A: assert not re.findall(r'https?://[\w.]+', Path(module.__file__).read_text(encoding='utf-8'))


# --- download --------------------------------------------------------------------------------------------------------

def test_full_download(server, get, tmp_path):
    seen = []
    assert get(progress=lambda *a: seen.append(a)).read_bytes() == BYTES
    assert names(tmp_path) == ['x.bin'] and seen[-1] == ('x.bin', len(BYTES), len(BYTES)) and 'checksum correct' in get.said[-1]
    get(); assert len(server.asked) == 1, 'a file that is there is not asked for again'


def test_existing_file_with_other_bytes_is_never_touched(get, tmp_path):
    (tmp_path / 'x.bin').write_text('mine')
    with pytest.raises(BadInput, match='out of the way'): get()
    assert (tmp_path / 'x.bin').read_text() == 'mine'


def test_truncated_answers_are_resumed_and_finished(server, get):
    server.cuts = [100_000, 50_000]
    assert get().read_bytes() == BYTES
    assert starts(server) == [0, 100_000, 150_000] and [i for *_, i in server.asked] == [None, '"one"', '"one"']


def test_server_without_ranges_begins_anew(server, get):
    server.ranges, server.cuts = False, [100_000]
    assert get().read_bytes() == BYTES and starts(server) == [0, 100_000]


def test_server_that_always_hangs_up_is_given_up_and_continued_later(server, get, tmp_path):
    server.cuts = [50_000] * 3
    with pytest.raises(BadInput, match='3 faults in a row') as e: get(tries=3)
    assert '150.0 kB are kept' in e.value.cure and names(tmp_path) == ['x.bin.part', 'x.bin.part.json']
    assert get().read_bytes() == BYTES and starts(server)[-1] == 150_000 and names(tmp_path) == ['x.bin']


def test_faults_count_from_the_last_real_progress(server, get):
    server.data = rng('long').bytes(3 * 2**20 + 5); server.cuts = [2**20] * 3
    assert get(hash='', tries=2).read_bytes() == server.data and len(server.asked) == 4


@pytest.mark.parametrize('obeys', [True, False])
def test_file_that_changed_between_the_parts(server, get, obeys):
    server.cuts = [100_000]
    with pytest.raises(BadInput): get(tries=1)
    server.data, server.tag, server.obeys_if_range = BYTES[::-1], '"two"', obeys
    assert get(hash='sha256:' + hashlib.sha256(BYTES[::-1]).hexdigest()).read_bytes() == BYTES[::-1]
    assert starts(server) == [0, 100_000] + ([] if obeys else [0])


def test_file_that_shrank_or_grew(server, get):
    server.tag = ''
    for size in (90_000, 400_000):
        server.data, server.cuts = BYTES, [100_000]
        with pytest.raises(BadInput): get(tries=1)
        server.data = rng('other').bytes(size)
        assert get(hash='').read_bytes() == server.data
        get(hash='').unlink()


def test_weak_tag_is_no_reason_to_resume_on(server, get):
    server.tag, server.cuts = 'W/"one"', [100_000]
    assert get().read_bytes() == BYTES and server.asked[1] == ('/x.bin', 'bytes=100000-', None)


def test_wrong_checksum_deletes_so_that_nothing_is_built_on_it(server, get, tmp_path):
    with pytest.raises(BadInput, match='was deleted') as e: get(hash='md5:' + '0' * 32)
    assert hashlib.md5(BYTES).hexdigest() in e.value.got and '0' * 32 in e.value.expected and names(tmp_path) == []


def test_missing_file_is_not_asked_for_twice(server, get, tmp_path):
    server.codes = [404]
    with pytest.raises(BadInput) as e: get()
    assert f'{server.url}/x.bin' in e.value.got and 'move' in e.value.expected and '--mirror' in e.value.cure
    assert len(server.asked) == 1 and names(tmp_path) == []


def test_overload_passes(server, get):
    server.codes = [500, 503]
    assert get().read_bytes() == BYTES and len(server.asked) == 3 and sum('attempt' in l for l in get.said) == 2


def test_pauses_double(server, get, monkeypatch):
    waits = []; monkeypatch.setattr(F.time, 'sleep', waits.append); server.codes = [500] * 9
    with pytest.raises(BadInput, match='500'): get(pause=1., tries=5)
    assert waits == [1, 2, 4, 8] and len(server.asked) == 5


def test_silence_is_a_fault(server, get, tmp_path):
    server.stalls = 2
    with pytest.raises(BadInput, match='nothing came for 0.3 s'): get(tries=2, timeout=.3)
    assert get().read_bytes() == BYTES


def test_redirects_are_followed_with_the_range(server, get):
    server.cuts = [100_000]
    assert get('/moved/x.bin').read_bytes() == BYTES
    assert server.asked[-1] == ('/x.bin', 'bytes=100000-', '"one"')


@pytest.mark.parametrize('cut', [None, 100_000])
def test_without_a_length_the_checksum_decides(server, get, tmp_path, cut):
    server.length, server.cuts = False, [cut]
    if cut is None: assert get().read_bytes() == BYTES
    else:
        with pytest.raises(BadInput, match='was deleted'): get()
        assert names(tmp_path) == [] and get().read_bytes() == BYTES


def test_nobody_listens(get, tmp_path, server):
    server.shutdown(); server.server_close()
    with pytest.raises(BadInput, match='2 faults in a row'): get(tries=2)


def test_only_web_addresses(tmp_path):
    for url in ('file:///etc/passwd', 'ftp://x/y', 'x.bin'):
        with pytest.raises(BadInput, match='address'): F.download(url, tmp_path / 'x')


def test_small_disk_is_noticed_before_writing(server, get, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(F.shutil, 'disk_usage', lambda _: usage._replace(free=A._MARGIN + 1000))
    with pytest.raises(BadInput, match='another disk') as e: get()
    assert re.match(r'67.1 MB free', e.value.got) and '67.4 MB for x.bin' in e.value.expected
    assert len(server.asked) == 1 and (tmp_path / 'x.bin.part').stat().st_size == 0


def test_disk_that_fills_up_meanwhile(server, get, tmp_path):
    def full(*_): raise OSError(F.errno.ENOSPC, 'No space left on device')
    with pytest.raises(BadInput, match='goes on where it stopped'): get(progress=full)
    assert 0 < (tmp_path / 'x.bin.part').stat().st_size < len(BYTES) and get().read_bytes() == BYTES and starts(server)[1] > 0


def test_other_faults_are_not_swallowed(get):
    def broken(*_): raise OSError(F.errno.EACCES, 'no')
    with pytest.raises(PermissionError): get(progress=broken)


def test_interrupt_keeps_what_came(server, get, tmp_path):
    def stop(name, done, length):
        if done > 100_000: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): get(progress=stop)
    kept = (tmp_path / 'x.bin.part').read_bytes()
    assert 0 < len(kept) < len(BYTES) and BYTES.startswith(kept) and not (tmp_path / 'x.bin').exists()
    assert get().read_bytes() == BYTES and starts(server)[1] == len(kept)


def test_kill_in_the_middle_leaves_a_part_that_the_next_call_resumes(server, get, tmp_path):
    server.pace = .05
    code = 'import sys; from wsl_nb.fetch import download; download(*sys.argv[1:])'
    child = subprocess.Popen([sys.executable, '-c', code, server.url + '/x.bin', str(tmp_path / 'x.bin'), RIGHT])
    part = tmp_path / 'x.bin.part'
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 60_000): assert time.monotonic() < deadline and child.poll() is None; time.sleep(.01)
    child.kill(); child.wait()
    assert names(tmp_path) == ['x.bin.part', 'x.bin.part.json']
    size, server.pace = part.stat().st_size, 0
    assert size < len(BYTES) and get().read_bytes() == BYTES and starts(server)[-1] == size


def test_part_without_a_note_or_of_another_address_is_not_trusted(server, get, tmp_path):
    (tmp_path / 'x.bin.part').write_bytes(b'?' * 1000)
    assert get().read_bytes() == BYTES and starts(server) == [0]
    for hash, second in (('', 0), (RIGHT, 100_000)):
        (tmp_path / 'x.bin').unlink(); server.asked.clear(); server.cuts = [100_000]
        with pytest.raises(BadInput): get('/a', hash, tries=1)
        assert get('/b', hash).read_bytes() == BYTES and server.asked[-1] == ('/b', f'bytes={second}-' if second else None, None)


def test_part_that_is_complete_or_too_long(server, get, tmp_path):
    for extra, asks in ((b'', 0), (b'?', 1)):
        server.asked.clear()
        (tmp_path / 'x.bin.part').write_bytes(BYTES + extra)
        (tmp_path / 'x.bin.part.json').write_text(json.dumps(dict(url=server.url + '/x.bin', length=len(BYTES), validator='"one"')))
        assert get().read_bytes() == BYTES and len(server.asked) == asks
        (tmp_path / 'x.bin').unlink()


def test_rest_that_does_not_exist(server, get, tmp_path):
    (tmp_path / 'x.bin.part').write_bytes(BYTES + b'?')
    (tmp_path / 'x.bin.part.json').write_text(json.dumps(dict(url=server.url + '/x.bin', length=None, validator='')))
    assert get().read_bytes() == BYTES and starts(server) == [len(BYTES) + 1, 0]


# --- mirrors and fetch -----------------------------------------------------------------------------------------------

def tgz(path, *entries):
    "A tar.gz of (name, bytes) or (name, header fields)."
    with tarfile.open(path, 'w:gz') as t:
        for name, given in entries:
            m = tarfile.TarInfo(name); data = given if isinstance(given, bytes) else b''
            m.size = len(data)
            for k, v in (given if isinstance(given, dict) else {}).items(): setattr(m, k, v)
            t.addfile(m, io.BytesIO(data))
    return Path(path)


@pytest.fixture
def source(tmp_path, monkeypatch):
    "A source 'small' with one archive; its official server does not exist. Returns the folder of a mirror."
    mirror = tmp_path / 'mirror'; mirror.mkdir()
    archive = tgz(mirror / 'small set.tar.gz', ('VOC/JPEGImages/a.jpg', b'a'), ('VOC/list.txt', b'a\n'))
    remote = F.Remote('http://127.0.0.1:9/small set.tar.gz', 'md5:' + hashlib.md5(archive.read_bytes()).hexdigest(), archive.name)
    monkeypatch.setattr(F, 'sources', lambda: dict(small=F.Source('small', 'voc', (remote,), 'home', 'note')))
    return mirror


@pytest.mark.parametrize('kind', ['folder', 'address'])
@pytest.mark.parametrize('keep', [True, False])
def test_fetch_from_a_mirror(source, server, tmp_path, kind, keep):
    server.data = (source / 'small set.tar.gz').read_bytes(); said, out = [], tmp_path / 'out'
    for _ in range(2): F.fetch('small', out, source if kind == 'folder' else server.url + '/pub/', keep, said.append)
    assert (out / 'VOC' / 'list.txt').read_text() == 'a\n' and (out / 'small set.tar.gz').exists() == keep
    assert said[-1] == f'small is complete; run: wsl-nb data check voc {out}' and 'already unpacked' in said[-2]
    assert [p for p, *_ in server.asked] == ([] if kind == 'folder' else ['/pub/small%20set.tar.gz'])


@pytest.mark.parametrize('kind', ['folder', 'address'])
def test_mirror_is_not_trusted(source, server, tmp_path, kind):
    server.data = b'<html>'; (source / 'small set.tar.gz').write_bytes(server.data)
    with pytest.raises(BadInput, match='begins like a web page'): F.fetch('small', tmp_path / 'out', source if kind == 'folder' else server.url, say=str)
    assert names(tmp_path / 'out') == []


def test_mirror_without_the_file(source, tmp_path):
    with pytest.raises(BadInput, match='mirror folder'): F.fetch('small', tmp_path / 'out', tmp_path / 'elsewhere', say=str)
    with pytest.raises(BadInput, match='one of small'): F.fetch('large', tmp_path / 'out')


@pytest.mark.parametrize('mirror', ['ftp://x/y', 'file:///x', 's3://bucket/x', Path('sftp://x/y')], ids=str)
def test_mirror_of_another_kind_is_refused_by_name(source, tmp_path, mirror):
    with pytest.raises(BadInput, match=f'the scheme {str(mirror).split(":")[0]}\n.*http') as e: F.fetch('small', tmp_path / 'out', mirror, say=str)
    assert 'local folder' in e.value.expected and not (tmp_path / 'out').exists()


def test_deleted_data_are_unpacked_again(source, tmp_path):
    F.fetch('small', tmp_path / 'out', source, say=str); shutil.rmtree(tmp_path / 'out' / 'VOC')
    F.fetch('small', tmp_path / 'out', source, say=str); assert (tmp_path / 'out' / 'VOC' / 'list.txt').exists()


def test_two_archives_meet_in_one_folder(tmp_path):
    A.extract(tgz(tmp_path / 'a.tgz', ('VOC/x/1', b'1'), ('VOC/same', b's')), tmp_path / 'out', say=str)
    A.extract(tgz(tmp_path / 'b.tgz', ('VOC/x/2', b'2'), ('VOC/same', b's')), tmp_path / 'out', say=str)
    assert sorted(p.name for p in (tmp_path / 'out' / 'VOC').rglob('*')) == ['1', '2', 'same', 'x']


# --- archives --------------------------------------------------------------------------------------------------------

LINK, HARD = (lambda to: dict(type=tarfile.SYMTYPE, linkname=to)), (lambda to: dict(type=tarfile.LNKTYPE, linkname=to))
ESCAPES = {  # the last member is the one that is refused
    'parent': [('../x', b'')], 'parent inside': [('a/../../x', b'')], 'absolute': [('/tmp/x', b'')], 'drive': [('C:/x', b'')], 'backslash': [('..\\x', b'')],
    'link out': [('l', LINK('..'))], 'link absolute': [('l', LINK('/etc/passwd'))], 'through a link': [('l', LINK('d')), ('l/x', b'')], 'case': [('l', LINK('d')), ('L/x', b'')],
    'links in a row': [('d/e/k', LINK('..')), ('l', LINK('d/e/k/../..'))], 'hard link out': [('h', HARD('../x'))], 'hard link absolute': [('h', HARD('/etc/passwd'))],
    'hard link to a link': [('l', LINK('d')), ('h', HARD('l'))], 'device': [('n', dict(type=tarfile.CHRTYPE, devmajor=1, devminor=3))],
    'pipe': [('p', dict(type=tarfile.FIFOTYPE))], 'no name': [('.', b'x')],
}


@pytest.mark.parametrize('entries', ESCAPES.values(), ids=ESCAPES)
def test_tar_that_escapes(tmp_path, entries):
    out = tmp_path / 'a' / 'out'
    with pytest.raises(BadInput, match='stay in their folder') as e: A.extract(tgz(tmp_path / 'bad.tgz', ('good', b'1'), *entries), out, say=str)
    assert f'"{entries[-1][0]}"' in e.value.got
    assert names(out) == [] and names(tmp_path) == ['a', 'bad.tgz'] and names(tmp_path / 'a') == ['out']


# the second link climbs from where the first one leads; each archive alone looks harmless
THREE = ('q/r/c', '../../p'), ('z', 'q/r/c/../../..'), ('z/PWNED', None)
DOWN = ('q/r/c', '../../p'), ('z', 'q/r/c/s'), ('z/PWNED', None)  # the same, but the second link is one that we allow when it comes first


def packed(path, name, target, kind):
    "An archive of one member: a link to `target`, or a file if that is None."
    if kind == 'tar': return tgz(path, (name, b'!' if target is None else LINK(target)))
    with zipfile.ZipFile(path, 'w') as z:
        info = zipfile.ZipInfo(name); info.external_attr = (0o100644 if target is None else 0o120777) << 16; z.writestr(info, target or '!')
    return path


def lies_within(out, seen):
    "Nothing beside the folder is new, and no link in it leads out."
    root = Path(os.path.realpath(out)); links = [p for p in root.rglob('*') if p.is_symlink()]
    return names(out.parent) == seen and all(Path(os.path.realpath(p)).is_relative_to(root) for p in links)


@pytest.mark.parametrize('entries', [THREE, DOWN], ids=['up', 'down'])
@pytest.mark.parametrize('order', [*itertools.permutations(range(3))], ids=str)
@pytest.mark.parametrize('kinds', [*itertools.product(['tar', 'zip'], repeat=3)], ids='-'.join)
def test_three_archives_in_one_folder(tmp_path, entries, order, kinds):
    out, refused = tmp_path / 'a' / 'b' / 'out', []; (out / 'p').mkdir(parents=True)
    for i in order:
        try: A.extract(packed(tmp_path / f'{i}', *entries[i], kinds[i]), out, say=str)
        except BadInput: refused.append(i)
        assert lies_within(out, ['out']) and names(tmp_path / 'a') == ['b'] and names(tmp_path)[-1] == 'a'
    assert set(refused) >= {i for i in (0, 1) if kinds[i] == 'zip'} and (1 in refused or entries is DOWN)
    assert (out / 'z' / 'PWNED').is_file() == (2 not in refused)
    if kinds == ('tar',) * 3 and entries is DOWN: assert refused == {(0, 1, 2): [1], (0, 2, 1): [1], (1, 0, 2): [2], (1, 2, 0): [2], (2, 0, 1): [1], (2, 1, 0): [1]}[order]
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob('PWNED')) == ([] if 2 in refused else ['a/b/out/z/PWNED'])


def test_three_archives_as_they_were_written(tmp_path):
    out = tmp_path / 'out'
    A.extract(packed(tmp_path / '0', *THREE[0], 'tar'), out, say=str)
    with pytest.raises(BadInput, match='"z": a link that'): A.extract(packed(tmp_path / '1', *THREE[1], 'tar'), out, say=str)
    assert names(out) == ['.0.done', 'q']
    (out / 'z').symlink_to(THREE[1][1])  # were it there all the same
    for kind in 'tar', 'zip':
        with pytest.raises(BadInput, match='leads through "z", a link in'): A.extract(packed(tmp_path / '2', *THREE[2], kind), out, say=str)
    assert names(out) == ['.0.done', 'q', 'z'] and names(tmp_path) == ['0', '1', '2', 'out']


@pytest.mark.parametrize('entries', [[('l/x', b'1')], [('l', b'1')], [('d/e/l/f/x', b'1')], [('k', LINK('l'))], [('k', LINK('d/e/l/f'))], [('l/f', dict(type=tarfile.DIRTYPE))]], ids=lambda e: e[0][0])
def test_link_on_the_disk_is_never_followed(tmp_path, entries):
    out, mine = tmp_path / 'out', tmp_path / 'mine'; (out / 'd' / 'e').mkdir(parents=True); mine.mkdir()
    for place in out / 'l', out / 'd' / 'e' / 'l': place.symlink_to(mine)
    with pytest.raises(BadInput, match='a link in') as e: A.extract(tgz(tmp_path / 'a.tgz', ('good', b'1'), *entries), out, say=str)
    assert f'"{entries[0][0]}"' in e.value.got and 'real folder' in e.value.cure
    assert names(mine) == [] and names(out) == ['d', 'l'] and names(out / 'd' / 'e') == ['l']


def test_link_that_appears_while_we_unpack_is_not_moved_into(tmp_path, monkeypatch):
    out, mine, whole = tmp_path / 'out', tmp_path / 'mine', A._unpack; mine.mkdir()
    def late(archive, spare): whole(archive, spare); (out / 'VOC').symlink_to(mine)
    monkeypatch.setattr(A, '_unpack', late)
    with pytest.raises(BadInput, match='1 files'): A.extract(tgz(tmp_path / 'a.tgz', ('VOC/x', b'1')), out, say=str)
    assert names(mine) == [] and names(out) == ['VOC']


def test_any_sequence_of_archives_stays_inside(tmp_path):
    "Random links and files over a few names: many are unpacked, none leads out."
    draw, done = rng('escape'), 0
    def path(): return '/'.join(draw.choice(['a', 'b', 'c'], draw.integers(1, 4)))
    def target(): return '/'.join(draw.choice(['a', 'b', 'c', '..'], draw.integers(1, 5), p=[.2, .2, .2, .4]))
    for turn in range(60):
        out = tmp_path / f'{turn}' / 'x' / 'y' / 'out'; out.mkdir(parents=True)
        for i in range(6):
            entries = [(path(), LINK(target()) if draw.random() < .7 else b'!') for _ in range(draw.integers(1, 3))]
            try: A.extract(tgz(tmp_path / 'archive', *entries), out, say=str); done += 1
            except BadInput: pass
            assert lies_within(out, ['out']) and names(out.parent.parent) == ['y'] and names(tmp_path / f'{turn}') == ['x'], entries
    assert done > 60


@pytest.mark.parametrize('name', ['.b.tgz.done', '.B.TGZ.DONE', '.b.tgz.unpacking/x', '.b.tgz.unpacking'])
def test_archive_cannot_write_our_notes(tmp_path, name):
    with pytest.raises(BadInput, match='our own notes'): A.extract(tgz(tmp_path / 'a.tgz', (name, b'{}')), tmp_path / 'out', say=str)
    assert names(tmp_path / 'out') == []


@pytest.mark.parametrize('text', ['[]', 'null', '{"seal"', '{}', '\x00'])
def test_marker_that_is_none(tmp_path, text):
    (tmp_path / '.a.done').write_text(text); assert A.extracted('a', tmp_path, 'md5:1') is False


def test_link_that_comes_after_what_leads_through_it(tmp_path):
    with pytest.raises(BadInput, match='"l/x": a path through a link'): A.extract(tgz(tmp_path / 'bad.tgz', ('l/x', b''), ('l', LINK('d'))), tmp_path / 'out', say=str)


@pytest.mark.parametrize('name', ['../x', '/x', 'a/../../x', 'C:\\x', '..\\..\\x'])
def test_zip_that_escapes(tmp_path, name):
    with zipfile.ZipFile(tmp_path / 'bad.zip', 'w') as z: z.writestr('good', '1'); z.writestr(name, 'x')
    with pytest.raises(BadInput, match='stay in their folder'): A.extract(tmp_path / 'bad.zip', tmp_path / 'out', say=str)
    assert names(tmp_path / 'out') == [] and names(tmp_path) == ['bad.zip', 'out']


def test_zip_with_a_link(tmp_path):
    link = zipfile.ZipInfo('l'); link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / 'bad.zip', 'w') as z: z.writestr(link, '/etc/passwd')
    with pytest.raises(BadInput, match='a link that leaves'): A.extract(tmp_path / 'bad.zip', tmp_path / 'out', say=str)


def test_harmless_links_survive(tmp_path):
    A.extract(tgz(tmp_path / 'a.tgz', ('d/x', b'1'), ('d/l', LINK('../d/x')), ('h', HARD('d/x'))), tmp_path / 'out', say=str)
    assert os.readlink(tmp_path / 'out' / 'd' / 'l') == '../d/x' and all((tmp_path / 'out' / n).read_bytes() == b'1' for n in ('d/x', 'd/l', 'h'))


def test_no_member_becomes_executable_for_others(tmp_path):
    A.extract(tgz(tmp_path / 'a.tgz', ('x', dict(mode=0o6777))), tmp_path / 'out', say=str)
    assert (tmp_path / 'out' / 'x').stat().st_mode & 0o6022 == 0


@pytest.mark.parametrize('kind', ['tar', 'zip', 'many'])
def test_bomb(tmp_path, monkeypatch, kind):
    usage = shutil.disk_usage(tmp_path); monkeypatch.setattr(A.shutil, 'disk_usage', lambda _: usage._replace(free=A._MARGIN + 2_000_000))
    zeros, file = bytes(1000) if kind == 'many' else bytes(3_000_000), tmp_path / 'bomb'
    if kind == 'zip':
        with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('x', zeros)
    else: tgz(file, *((f'x{i}', zeros) for i in range(400 if kind == 'many' else 1)))
    assert file.stat().st_size < 20_000
    with pytest.raises(BadInput, match='another disk'): A.extract(file, tmp_path / 'out', say=str)
    assert names(tmp_path / 'out') == []


def test_bomb_is_not_read_to_its_end(tmp_path, monkeypatch):
    looked = []; monkeypatch.setattr(A, '_members', lambda _: (looked.append(i) or A._Member(str(i), 10**15, 'file') for i in range(1000)))
    with pytest.raises(BadInput, match='at least'): A._check_members('x.tar', tmp_path)
    assert len(looked) < 1000


@pytest.mark.parametrize('kind', ['tar', 'tgz', 'txz', 'zip', 'password', 'text', 'empty'])
def test_damaged_archive(tmp_path, kind):
    file, noise = tmp_path / 'a', rng('noise').bytes(50_000)
    if kind in ('zip', 'password'):
        with zipfile.ZipFile(file, 'w') as z: z.writestr('x', noise)
        raw = bytearray(file.read_bytes())
        if kind == 'zip': raw[25_000] ^= 1
        else:  # the flag of encryption, in both headers
            for mark, at in ((b'PK\3\4', 6), (b'PK\1\2', 8)): raw[raw.rindex(mark) + at] |= 1
        file.write_bytes(raw)
    elif kind in ('text', 'empty'): file.write_bytes(b'' if kind == 'empty' else b'no archive' * 100)
    else:
        with tarfile.open(file, dict(tar='w', tgz='w:gz', txz='w:xz')[kind]) as t:
            m = tarfile.TarInfo('x'); m.size = len(noise); t.addfile(m, io.BytesIO(noise))
        file.write_bytes(file.read_bytes()[:30_000])
    with pytest.raises(BadInput, match='fetch it again'): A.extract(file, tmp_path / 'out', say=str)
    assert not (tmp_path / 'out').exists() or names(tmp_path / 'out') == []


FOLDER = dict(type=tarfile.DIRTYPE)
BROKEN = {'file then folder': [('a', b''), ('a/b', b'')], 'folder then file': [('a/b', b''), ('a', b'')], 'file then its folder': [('a', b''), ('a/', FOLDER)], 'deep': [('a', b''), ('a/b/c/d', b'')],
          'long': [('n' * 300, b'')], 'long folder': [('a/' + 'n' * 300 + '/b', b'')], 'long link': [('a', LINK('n' * 5000))], 'long link name': [('n' * 300, LINK('a'))], 'zero byte': [('x', dict(pax_headers={'path': 'a\0b'}))]}


@pytest.mark.parametrize('case, kind', [(c, k) for c in BROKEN for k in ('tar', 'zip') if k == 'tar' or not re.search('link|byte', c)])  # what a zip can hold
def test_names_that_cannot_be_written_are_damage(tmp_path, case, kind):
    entries, out = BROKEN[case], tmp_path / 'out'
    if kind == 'tar': tgz(tmp_path / 'a', ('good', b'1'), *entries)
    else:
        with zipfile.ZipFile(tmp_path / 'a', 'w') as z: [z.writestr(n, '') for n in ('good', *(n for n, _ in entries))]
    with pytest.raises(BadInput, match='a, which is damaged') as e: A.extract(tmp_path / 'a', out, say=str)
    assert e.value.cure == 'delete it and fetch it again' and names(out) == [] and names(tmp_path) == ['a', 'out']
    if case != 'zero byte': assert '"a"' in e.value.got or 'n' * 40 in e.value.got
    assert str(tmp_path) not in e.value.got and len(e.value.got) < 200


@pytest.mark.parametrize('code', ['ENOTDIR', 'EEXIST', 'EISDIR', 'ENAMETOOLONG', 'EINVAL', 'ELOOP'])
def test_faults_of_a_name_name_the_member(tmp_path, monkeypatch, code):
    "What this disk takes another one may refuse, e.g. two names that differ in case."
    def refuse(self, spare, **_): raise OSError(getattr(A.errno, code), 'refused', str(Path(spare) / 'VOC' / 'x?'))
    monkeypatch.setattr(tarfile.TarFile, 'extractall', refuse)
    with pytest.raises(BadInput, match='"VOC/x\\?" cannot be written \\(refused\\)'): A.extract(tgz(tmp_path / 'a', ('x', b'1')), tmp_path / 'out', say=str)
    assert names(tmp_path / 'out') == []


def test_faults_of_the_disk_are_not_called_damage(tmp_path, monkeypatch):
    def refuse(*_, **__): raise OSError(A.errno.EACCES, 'no')
    monkeypatch.setattr(tarfile.TarFile, 'extractall', refuse)
    with pytest.raises(PermissionError): A.extract(tgz(tmp_path / 'a', ('x', b'1')), tmp_path / 'out', say=str)
    assert names(tmp_path / 'out') == []


def test_interrupted_unpacking_leaves_nothing(tmp_path, monkeypatch):
    archive, whole = tgz(tmp_path / 'a.tgz', ('VOC/1', b'1'), ('VOC/2', b'2')), A._unpack
    def half(archive, spare): (Path(spare) / 'VOC').mkdir(); (Path(spare) / 'VOC' / '1').write_bytes(b''); raise KeyboardInterrupt
    monkeypatch.setattr(A, '_unpack', half)
    with pytest.raises(KeyboardInterrupt): A.extract(archive, tmp_path / 'out', say=str)
    assert names(tmp_path / 'out') == []
    monkeypatch.setattr(A, '_unpack', whole)
    spare = tmp_path / 'out' / '.a.tgz.unpacking'; spare.mkdir(); (spare / 'rest').write_text('of a kill')
    A.extract(archive, tmp_path / 'out', say=str); assert names(tmp_path / 'out') == ['.a.tgz.done', 'VOC'] and names(tmp_path / 'out' / 'VOC') == ['1', '2']


def test_interrupted_moving_is_completed(tmp_path, monkeypatch):
    archive, out = tgz(tmp_path / 'a.tgz', *((f'VOC/{i}', b'%d' % i) for i in range(4))), tmp_path / 'out'
    (out / 'VOC').mkdir(parents=True); real, done = os.replace, []
    def twice(*a):
        if len(done) == 2: raise KeyboardInterrupt
        done.append(real(*a))
    monkeypatch.setattr(A.os, 'replace', twice)
    with pytest.raises(KeyboardInterrupt): A.extract(archive, out, say=str)
    assert names(out) == ['VOC'] and names(out / 'VOC') == ['0', '1']
    monkeypatch.setattr(A.os, 'replace', real)
    A.extract(archive, out, say=str); assert names(out / 'VOC') == ['0', '1', '2', '3'] and names(out) == ['.a.tgz.done', 'VOC']


def test_files_in_the_way_are_never_overwritten(tmp_path):
    out = tmp_path / 'out'; (out / 'VOC').mkdir(parents=True); (out / 'VOC' / 'b').write_text('mine'); (out / 'c').mkdir()
    with pytest.raises(BadInput, match='2 files'): A.extract(tgz(tmp_path / 'a.tgz', ('VOC/a', b'1'), ('VOC/b', b'2'), ('c', b'3')), out, say=str)
    assert names(out) == ['VOC', 'c'] and names(out / 'VOC') == ['b'] and (out / 'VOC' / 'b').read_text() == 'mine'


def test_new_archive_of_the_same_name_is_not_taken_for_the_old(tmp_path):
    out = tmp_path / 'out'
    for n in b'1', b'2': A.extract(tgz(tmp_path / 'a.tgz', (n.decode(), n)), out, say=str)
    assert names(out) == ['.a.tgz.done', '1', '2']
