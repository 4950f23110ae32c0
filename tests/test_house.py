"The house keeps its rules: exports in sync, arrows between modules, sizes, documentation, notebooks, README, light imports."
import ast, configparser, io, json, os, re, subprocess, sys, tokenize
from pathlib import Path

import pytest

import build_docs, check_sync, run_notebooks

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(p for p in (ROOT / 'wsl_nb').glob('*.py') if p.name[0] != '_')
BOOKS = sorted(p for p in (ROOT / 'nbs').glob('*.ipynb') if p.name[0] not in '_.')
METHODS = {'more', 'cdtr', 'affinity', 'surgery', 'fsgr'}
BASE = {'metrics', 'boxes', 'captions', 'crf', 'vit', 'maps', 'fetch'}
MAY = {'core': set(), **{b: {'core'} for b in BASE}, 'data': BASE | {'core'}, 'formats': BASE | {'core', 'data'}, 'training': {'core', 'metrics'},
       'viz': {'core'}, 'widgets': {'core', 'viz'}}  # design section 2; methods may import all of these
TOP = {'pretrain', 'cli'}
named = lambda path: path.name
FLAGGED = {'slow', 'gpu', 'data'}  # cells that are run on request only


def family(module):
    "The room a module belongs to: more_recipe -> more, data_farm -> data."
    return next((x for x in sorted(METHODS | set(MAY) | TOP, key=len) if module == x or module.startswith(x + '_')), None)


def functions(tree):
    "Every function with the class it is in, if any; functions inside functions are left out."
    for node in tree.body:
        if isinstance(node, ast.FunctionDef): yield node, None
        if isinstance(node, ast.ClassDef): yield from ((f, node) for f in node.body if isinstance(f, ast.FunctionDef))


def comment_lines(text):
    "Numbers of the lines that end in a comment."
    return {t.start[0] for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT}


def book_cells(book):
    "Code cells as (source, directives, outputs)."
    for cell in json.loads(book.read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'code': yield source, build_docs.directives(source), cell['outputs']


def lines(source):
    "Lines that are neither empty nor a directive."
    return [l for l in source.splitlines() if l.strip() and not re.match(r'#\s?\|', l)]


# --- exports, README, outputs --------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind, command, part, pattern, empty', [('export', 'nbdev_export', 'wsl_nb', '*.py', True), ('clean', 'nbdev_clean', 'nbs', '*.ipynb', False)])
def test_generated_files_are_in_sync(kind, command, part, pattern, empty):
    assert check_sync.differing(command, part, pattern, empty) == []


def test_readme_is_what_the_index_says():
    assert build_docs.readme() == build_docs.readme_files(), 'run `make docs`'


def test_readers_see_no_hidden_cell_and_no_directive():
    for book in BOOKS:
        for cell in build_docs.for_readers(json.loads(book.read_text(encoding='utf-8')))['cells']:
            if cell['cell_type'] == 'code': assert not build_docs.directives(cell['source']), book.name


def test_a_comment_does_not_make_outputs_stale_and_code_does():
    bare = run_notebooks.bare
    assert bare('#| export\ndef f(x): # (B,)\n    "Says."\n    return "# x"\n') == bare('#| export\n\ndef f(x): # other\n    "Says more."\n    # why\n    return "# x"')
    assert bare('f(1)') != bare('f(2)') and bare('#| slow\nf(1)') != bare('f(1)') and bare('%magic') == '%magic'


def test_outputs_hold_what_depends_on_nothing_but_the_code():
    for book in BOOKS:
        for source, words, outputs in book_cells(book):
            text = json.dumps([{k: v for k, v in (o.get('data') or {}).items() if not k.startswith('image/')} | {'text': o.get('text')} for o in outputs])
            assert all(o['output_type'] != 'error' for o in outputs), f'{book.name} has an error output'
            assert not (outputs and {'slow', 'gpu', 'data'} & set(words)), f'{book.name} has outputs of a cell that is not run'
            assert not re.search(r'/home/|/root/|/tmp/|/Users/|site-packages|object at 0x|' + re.escape(str(ROOT)), text), f'{book.name} shows a path or an address: {text[:200]}'


# --- modules ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('file', MODULES, ids=named)
def test_imports_follow_the_arrows(file):
    me, reached = family(file.stem), run_notebooks.imported(file.read_text(encoding='utf-8'))
    assert me, f'{file.name} has no room in design section 2'
    for to in {family(m) for m in reached} - {me}:
        assert me in TOP or (me in METHODS and to in MAY) or to in MAY.get(me, ()), f'{me} imports {to}'


@pytest.mark.parametrize('file', MODULES, ids=named)
def test_sizes(file):
    "Modules up to 550 code lines, functions up to 40."
    text = file.read_text(encoding='utf-8')
    code = [l for l in text.splitlines() if l.strip() and not l.strip().startswith('#')]
    assert len(code) <= 550, f'{len(code)} code lines'
    long = {f.name: f.end_lineno - f.lineno + 1 for f in ast.walk(ast.parse(text)) if isinstance(f, ast.FunctionDef) and f.end_lineno - f.lineno >= 40}
    assert not long, f'longer than 40 lines: {long}'


@pytest.mark.parametrize('file', MODULES, ids=named)
def test_everything_public_says_what_it_gives(file):
    text = file.read_text(encoding='utf-8'); tree, commented = ast.parse(text), comment_lines(file.read_text(encoding='utf-8'))
    assert ast.get_docstring(tree), 'no summary line in the notebook'
    public = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name[0] != '_'] + [f for f, c in functions(tree) if f.name[0] != '_' and (c is None or c.name[0] != '_')]
    assert not [n.name for n in public if not ast.get_docstring(n)], 'without docstring'
    silent = []
    for function, owner in functions(tree):
        if function.name[0] == '_' and function.name != '__init__' or owner and owner.name[0] == '_': continue
        static = any(getattr(d, 'id', '') == 'staticmethod' for d in function.decorator_list)
        given = function.args.posonlyargs + function.args.args[owner is not None and not static:] + function.args.kwonlyargs
        given += [a for a in (function.args.vararg, function.args.kwarg) if a]
        silent += [f'{function.name}({a.arg})' for a in given if a.end_lineno not in commented and a.arg != 'ctx']
    assert not silent, f'parameters without a comment: {silent}'


@pytest.mark.parametrize('file', MODULES, ids=named)
def test_nothing_is_imported_by_star_or_from_fastcore(file):
    for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom): assert all(a.name != '*' for a in node.names) and not (node.module or '').startswith(('fastcore', 'nbdev', 'execnb'))
        if isinstance(node, ast.Import): assert not any(a.name.split('.')[0] in ('fastcore', 'nbdev', 'execnb') for a in node.names)


@pytest.mark.parametrize('file', [*MODULES, *sorted((ROOT / 'tests').glob('*.py')), *sorted((ROOT / 'tools').glob('*.py'))], ids=named)
def test_what_is_imported_is_used(file):
    "In the file, or by those who take it from there; `noqa: F401` marks what an import does by itself."
    text = file.read_text(encoding='utf-8'); lines, tree = text.splitlines(), ast.parse(text)
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    idle = {(a.asname or a.name).split('.')[0] for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)) and 'noqa: F401' not in lines[n.end_lineno - 1] for a in n.names} - used
    if not idle: return
    others = [p.read_text(encoding='utf-8') for p in (*MODULES, *(ROOT / 'tests').glob('*.py')) if p != file] + [s for b in BOOKS for s, *_ in book_cells(b)]
    taken = set(re.findall(rf'\b{file.stem}\.(\w+)', '\n'.join(others)))
    for found in re.findall(rf'(?m)^ *from (?:\.|wsl_nb\.){file.stem} import ([^\n(]+|\([^)]+\))', '\n'.join(others)): taken |= set(re.findall(r'\w+', found))
    assert not idle - taken, f'imported and used nowhere: {sorted(idle - taken)}'


def test_every_exported_symbol_is_tested():
    "A test cell or a file in tests/ uses every public function and class, itself or through one that it uses."
    tests = [p.read_text(encoding='utf-8') for p in (ROOT / 'tests').glob('*.py')]
    tests += [s for b in BOOKS for s, words, _ in book_cells(b) if not {'export', 'exporti', 'exports'} & set(words)]
    parts = {}  # name -> source of what defines it
    for file in MODULES:
        text = file.read_text(encoding='utf-8')
        for node in ast.parse(text).body:
            names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else [t.id for t in getattr(node, 'targets', []) if isinstance(t, ast.Name)]
            for name in names: parts[name] = parts.get(name, '') + ast.get_source_segment(text, node)
    parts.pop('__all__', None); todo, used = tests, set()
    while todo:
        words = set(re.findall(r'\w+', todo.pop())) & parts.keys() - used
        used |= words; todo += [parts[w] for w in words]
    assert not [n for n in parts if n not in used and n[0] != '_'], 'no cell and no test uses them'


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='measured in forked processes')
def test_importing_a_module_is_light():
    "Beyond torch (pictures: and matplotlib) every module costs under half a second, and none pulls in the slow libraries."
    code = '''import json, os, sys, time, torch, numpy, PIL.Image, yaml, torch.utils.data
heavy = {'torchvision', 'timm', 'open_clip', 'accelerate', 'cv2', 'torchmetrics', 'pycocotools', 'transformers', 'pandas', 'IPython'}
pictures = set(sys.argv.pop(1).split(','))
for name in sorted(sys.argv[1:], key=lambda n: n in pictures):
    sys.stdout.flush()
    if name in pictures: import matplotlib.figure
    if not os.fork():
        start = time.process_time(); __import__('wsl_nb.' + name); seconds = time.process_time() - start
        print(json.dumps([name, seconds, sorted((heavy | ({'matplotlib', 'ipywidgets'} if name not in pictures else set())) & set(sys.modules))]), flush=True); os._exit(0)
    os.wait()'''
    pictures = ','.join(m.stem for m in MODULES if family(m.stem) in ('viz', 'widgets'))
    done = subprocess.run([sys.executable, '-c', code, pictures, *(m.stem for m in MODULES)], capture_output=True, text=True, check=True, cwd=ROOT)
    found = [json.loads(l) for l in done.stdout.splitlines()]
    assert len(found) == len(MODULES), done.stderr
    assert not [f for f in found if f[2]], 'slow libraries at import'
    assert not [f for f in found if f[1] > .5], 'slow import'


# --- notebooks -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('book', BOOKS, ids=named)
def test_notebook_rules(book):
    assert book.stat().st_size <= 1e6, 'larger than 1 MB'
    fetches = re.compile(r'urlopen|urlretrieve|requests\.get|\bwget\b|\bcurl\b|download=True|hf_hub_download|snapshot_download|load_state_dict_from_url|download_url|pretrained=True')
    for source, words, _ in book_cells(book):
        limit = 90 if '@dataclass' in source else 65 if re.search(r'^class ', source, re.M) else 40  # fields are a list, and no method can leave its class's cell
        assert len(lines(source)) <= limit, f'{len(lines(source))} lines: {source[:80]}'
        if words.get('eval') != 'false': assert not fetches.search(source), f'fetches something: {source[:80]}'
        assert not re.search(r'^\s*from \S+ import \*', source, re.M), f'star import: {source[:80]}'
        assert not re.search(r'warnings\.(simple)?filter(warnings)?\(.ignore', source), f'hides warnings: {source[:80]}'
        try: body = ast.parse(source).body
        except SyntaxError: continue
        imports = [isinstance(n, (ast.Import, ast.ImportFrom)) for n in body]
        assert all(imports) or not any(imports), f'imports and other statements in one cell: {source[:80]}'
        if 'export' in words: assert sum(isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0] != '_' for n in body) <= 1, f'two public symbols in one cell: {source[:80]}'


@pytest.mark.parametrize('book', BOOKS, ids=named)
def test_notebook_opens_with_title_and_summary(book):
    assert re.match(r'# .+\n\n> .+', run_notebooks.head(book)), 'the first cell is "# Title", an empty line, "> summary"'


def test_notebooks_run_with_the_lab_extra_alone():
    "Every package that a notebook imports outside functions is installed by the core and by `lab`: what `make lab` gives."
    config = configparser.ConfigParser(delimiters=['=']); config.read(ROOT / 'settings.ini', encoding='utf-8')
    wanted = [re.split('[<>=!]', l.strip())[0].lower() for key in ('requirements', 'lab_requirements') for l in config['DEFAULT'][key].splitlines() if l.strip()]
    imports = {'PIL': 'pillow', 'yaml': 'pyyaml', 'cv2': 'opencv-python-headless', 'skimage': 'scikit-image', 'sklearn': 'scikit-learn', 'IPython': 'jupyterlab', 'open_clip': 'open_clip_torch'}
    for book in BOOKS:
        for source, words, _ in book_cells(book):
            if FLAGGED & set(words): continue
            try: body = ast.parse(source).body
            except SyntaxError: continue
            tops = {a.name for n in body if isinstance(n, ast.Import) for a in n.names} | {n.module for n in body if isinstance(n, ast.ImportFrom) and n.module and not n.level}
            for name in {t.split('.')[0] for t in tops} - sys.stdlib_module_names - {'wsl_nb'}:
                assert imports.get(name, name).lower() in wanted, f'{book.name} imports {name}, which `make lab` does not install'


def test_lessons_keep_their_budget():
    assert sum(b.stat().st_size for b in BOOKS) <= 15e6
    for book in BOOKS:
        if not re.match(r'0[2-6]', book.name): continue
        cells = json.loads(book.read_text(encoding='utf-8'))['cells']
        code = sum(len(lines(''.join(c['source']))) for c in cells if c['cell_type'] == 'code')
        words = sum(len(''.join(c['source']).split()) for c in cells if c['cell_type'] == 'markdown')
        assert code <= 450 and words <= 2600, f'{book.name}: {code} code lines, {words} words'


# --- repository ------------------------------------------------------------------------------------------------------

def test_licence_and_origins_are_complete():
    text = (ROOT / 'LICENSE').read_text(encoding='utf-8')
    assert 'Apache License' in text and 'END OF TERMS AND CONDITIONS' in text and len(text) > 11000
    notice = (ROOT / 'NOTICE').read_text(encoding='utf-8')
    for word in ('re-written', 'our own', 'no pretrained weights', 'torch'): assert word in notice


def test_no_file_names_a_machine():
    "No path of one machine in code, notebooks or settings; only .ci/run may look beside the repository."
    files = [*MODULES, *BOOKS, *(ROOT / 'tools').glob('*.py'), ROOT / 'Makefile', ROOT / 'settings.ini', ROOT / 'setup.py']
    for file in files: assert not re.search(r'\.\./shared|/work/(main|shared|scratch)|/root/', file.read_text(encoding='utf-8')), file.name


def test_make_says_when_the_disk_is_too_small(tmp_path):
    (tmp_path / 'df').write_text('#!/bin/sh\nprintf "head\\nx 1 1 3500000 1%% /\\n"\n'); (tmp_path / 'df').chmod(0o755)
    found = subprocess.run(['make', '-C', str(ROOT), f'VENV={tmp_path}/new', f'PYTHON={sys.executable}', 'demo'], env=os.environ | {'PATH': f'{tmp_path}:{os.environ["PATH"]}'}, capture_output=True, text=True)
    assert found.returncode == 2 and '3.5 GB free, expected 7' in found.stderr and not (tmp_path / 'new').exists()


def test_versions_agree():
    import wsl_nb
    assert re.search(r'^version = (.+)$', (ROOT / 'settings.ini').read_text(encoding='utf-8'), re.M)[1].strip() == wsl_nb.__version__
    assert subprocess.run([sys.executable, 'setup.py', '--version'], cwd=ROOT, capture_output=True, text=True).stdout.strip().splitlines()[-1] == wsl_nb.__version__
