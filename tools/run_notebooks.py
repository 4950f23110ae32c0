"""Renews the outputs that are committed with the notebooks, or checks that they are not stale.

    python tools/run_notebooks.py [NAME …]            run the stale notebooks (or those named) and store their outputs
    python tools/run_notebooks.py --all               run every notebook
    python tools/run_notebooks.py --check [NAME …]    run nothing; exit 1 if the outputs of a notebook are older than its code

Runs on execnb, the engine of `nbdev_test`, because it knows the directives: cells marked slow, gpu, data or `eval: false`
are not run and hold no outputs. Every notebook runs in a fresh process, in the folder of the notebooks. `nbs/outputs.json`
holds, for every notebook, the hash of all that its outputs depend on: its code cells, and the modules of wsl_nb that it
imports, directly or through others, each without comments and docstrings.
"""
import argparse, ast, base64, contextlib, hashlib, io, json, multiprocessing, os, re, sys, tempfile, time, tokenize
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS, PACKAGE, RECORD = ROOT / 'nbs', ROOT / 'wsl_nb', ROOT / 'nbs' / 'outputs.json'
FLAGS = {'slow', 'gpu', 'data'}  # as tst_flags of settings.ini
VIEWS = ('application/vnd.jupyter.widget-view+json',)  # change at every save and show nothing without a kernel


def docstring_lines(tree):
    "Line numbers that belong to docstrings."
    lines = set()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)): continue
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            lines |= set(range(first.lineno, first.end_lineno + 1))
    return lines


def bare(source):
    "Source without comments, docstrings, blank lines and `__all__`; directives stay. Text that is no Python stays whole."
    try:
        tree = ast.parse(source)
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, tokenize.TokenError):
        return source
    lines = source.splitlines()
    for token in tokens:
        row, column = token.start
        if token.type == tokenize.COMMENT and not token.string.startswith('#|'): lines[row - 1] = lines[row - 1][:column]
    drop = docstring_lines(tree)
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '__all__': drop |= set(range(node.lineno, node.end_lineno + 1))
    return '\n'.join(l.rstrip() for i, l in enumerate(lines, 1) if i not in drop and l.strip())


def imported(source, inside=True):
    "Modules of wsl_nb that the source names in an import; without `inside` only those outside functions."
    try: tree = ast.parse(source)
    except SyntaxError: return set()
    found = set()
    for node in ast.walk(tree) if inside else tree.body:
        if isinstance(node, ast.Import): found |= {a.name.split('.')[1] for a in node.names if a.name.startswith('wsl_nb.')}
        if not isinstance(node, ast.ImportFrom): continue
        inner = (node.module or '').removeprefix('wsl_nb').strip('.')
        if node.level or (node.module or '').split('.')[0] == 'wsl_nb': found |= {inner.split('.')[0]} if inner else {a.name for a in node.names}
    return {m for m in found if (PACKAGE / f'{m}.py').exists()}


def closure(modules):
    "These modules and all that they import."
    todo, seen = set(modules), set()
    while todo:
        module = todo.pop(); seen.add(module)
        todo |= imported((PACKAGE / f'{module}.py').read_text(encoding='utf-8'), not module.startswith('cli')) - seen
    return sorted(seen)


def code_cells(book):
    "Sources of the code cells."
    return [''.join(c['source']) for c in json.loads(book.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']


def head(book):
    "Text of the first cell: title and summary."
    return next((''.join(c['source']) for c in json.loads(book.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'markdown'), '')


def state(book):
    "Hash of all that the outputs of a notebook depend on."
    cells = code_cells(book); digest = hashlib.sha256()
    for cell in cells: digest.update(bare(cell).encode() + b'\0')
    inside = '_cli' not in book.stem  # the command line reaches everything and shows nothing of it
    for module in closure(set().union(*(imported(c, inside) for c in cells))):
        digest.update(module.encode() + bare((PACKAGE / f'{module}.py').read_text(encoding='utf-8')).encode() + b'\0')
    for read, files in {r'(recorded|read_results|read_findings|read_scores)\(|\.\./results|RESULTS': (ROOT / 'results').rglob('*.json'), 'shipped': (PACKAGE / 'assets').glob('*.json')}.items():
        if any(re.search(read, c) for c in cells):
            for file in sorted(files): digest.update(file.read_bytes())
    if book.stem == 'index':  # its tables list the other notebooks
        for other in sorted(NBS.glob('[0-9]*.ipynb')): digest.update(other.name.encode() + head(other).encode())
    return digest.hexdigest()[:16]


def recorded():
    "What `nbs/outputs.json` says."
    return json.loads(RECORD.read_text(encoding='utf-8')) if RECORD.exists() else {}


def note(name, value):
    "Writes one entry, whole or not at all."
    known = {k: v for k, v in (recorded() | {name: value}).items() if (NBS / k).exists()}
    with tempfile.NamedTemporaryFile('w', dir=NBS, prefix='.outputs', delete=False, encoding='utf-8') as f:
        f.write(json.dumps(known, indent=1, sort_keys=True) + '\n')
    os.chmod(f.name, 0o644); os.replace(f.name, RECORD)


def skipped(cell):
    "Cells that are never run for committing."
    words = getattr(cell, 'directives_', None) or {}
    return cell.cell_type != 'code' or words.get('eval:', [''])[0].lower() == 'false' or bool(FLAGS & set(words))


def compact(png):
    "A picture in base64 with a palette of 256 colours, about half as large; unchanged where it sees through, or would grow."
    from PIL import Image
    raw = base64.b64decode(png); picture = Image.open(io.BytesIO(raw)); spare = io.BytesIO()
    if picture.mode == 'RGBA' and picture.getextrema()[3][0] < 255 or picture.mode == 'P': return png.rstrip()
    picture.convert('RGB').quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE).save(spare, 'PNG', optimize=True)
    return base64.b64encode(spare.getvalue()).decode() if len(spare.getvalue()) < len(raw) else png.rstrip()


def tidy(outputs):
    "Outputs without counters, widget views and control characters, pictures with a palette."
    kept = []
    for out in outputs:
        out = dict(out)
        if 'execution_count' in out: out['execution_count'] = None
        if out.get('data'):
            if set(VIEWS) & set(out['data']): continue
            out['data'] = {k: compact(v) if k == 'image/png' else v for k, v in dict(out['data']).items()}
        if out.get('output_type') == 'stream':
            if out.get('name') == 'stderr': continue
            if not ''.join(out['text']).strip('\x00\x1b[2K\r\n \x0c'): continue
        if out.get('output_type') != 'stream' and not out.get('data') and out.get('output_type') != 'error': continue
        kept.append(out)
    return kept


def run(book):
    "Runs one notebook in this process and writes its outputs. Returns (name, seconds, error or '')."
    if 'fork' in multiprocessing.get_all_start_methods(): multiprocessing.set_start_method('fork', force=True)  # loader workers see what cells defined
    start, value, before = time.perf_counter(), state(book), book.read_bytes()
    os.chdir(NBS); sys.path.insert(0, str(ROOT)); os.environ['MPLBACKEND'] = 'module://matplotlib_inline.backend_inline'
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell
    from nbdev.process import NBProcessor
    marked = NBProcessor(book, rm_directives=False).nb.cells
    skip = {c.idx_ for c in marked if skipped(c)}
    nb = read_nb(book)
    for cell in nb.cells:
        if cell.cell_type == 'code': cell.outputs = []
    shell = CaptureShell(book, mpl_format='png')
    try: shell.run_all(nb, exc_stop=True, preproc=lambda c: c.idx_ in skip)
    except BaseException: return book.name, time.perf_counter() - start, shell.prettytb(fname=book.name) if shell.exc else 'stopped'
    for cell in nb.cells:
        if cell.cell_type == 'code': cell.outputs, cell.execution_count = tidy(cell.outputs), None
    if book.read_bytes() != before: return book.name, time.perf_counter() - start, 'changed on disk while it ran; nothing written'
    nb.metadata.pop('widgets', None); nb.pop('path_', None)
    with contextlib.redirect_stdout(sys.stderr): write_nb(nb, book)
    note(book.name, value)
    return book.name, time.perf_counter() - start, ''


def chosen(names):
    "Notebooks by name (`02_more`, `02_more.ipynb`, `nbs/02_more.ipynb`); all of them without names."
    books = {b.stem: b for b in sorted(NBS.glob('*.ipynb')) if b.name[0] not in '_.'}
    unknown = [n for n in names if Path(n).stem not in books]
    if unknown: sys.exit(f'no notebook {unknown}; there are {", ".join(books)}')
    return [books[Path(n).stem] for n in names] or list(books.values())


def main():
    "Command line; see the top of this file."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('names', nargs='*'); parser.add_argument('--check', action='store_true'); parser.add_argument('--all', action='store_true')
    args = parser.parse_args(); books, known = chosen(args.names), recorded()
    stale = [b for b in books if known.get(b.name) != state(b)]
    if args.check:
        for b in stale: print(f'stale: {b.name} has outputs older than its code or the modules it imports; run `make refresh`')
        print(f'{len(books) - len(stale)} of {len(books)} notebooks are up to date'); sys.exit(bool(stale))
    failed = False
    for book in books if args.all or args.names else stale:
        with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool: name, seconds, error = pool.submit(run, book).result()
        print(f'{name}: {seconds:.0f} s' + (f'\n{error}' if error else ''), flush=True); failed |= bool(error)
    sys.exit(failed)


if __name__ == '__main__': main()
