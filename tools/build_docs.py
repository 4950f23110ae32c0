"""Makes README.md from nbs/index.ipynb and the site in _docs from all notebooks.

    python tools/build_docs.py             write both
    python tools/build_docs.py --check     build the site; exit 1 if README.md is not what the index notebook says
    python tools/build_docs.py --readme    README.md only

The committed outputs are the source: nothing is executed. Readers see every cell except those marked hide, default_exp,
slow or gpu, and no directives; exported code stays. A warning of Sphinx is an error. The pages need no connection.
"""
import argparse, base64, json, re, shutil, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS, PROC, SITE = ROOT / 'nbs', ROOT / '_proc', ROOT / '_docs'
DROPPED = {'hide', 'default_exp', 'slow', 'gpu'}
PARTS = {'Lessons': range(0, 10), 'Workshop': range(10, 20), 'Evidence': range(20, 100)}
WRITTEN = '<!-- written by tools/build_docs.py from nbs/index.ipynb; edit that and run `make docs` -->\n\n'
CONF = '''project = {title!r}
author = copyright = "wsl_nb contributors"
extensions = ["myst_nb", "sphinx-mathjax-offline"]
html_theme = "furo"
html_title = {title!r}
html_static_path = ["_static"]
html_css_files = ["wsl_nb.css"]
html_show_sphinx = False
html_copy_source = html_show_sourcelink = False
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "jupyter_execute"]
'''
CSS = '''.bd-page-width, .content { width: 50em; }
div.cell_output img { max-width: 100%; height: auto; }
div.cell_output img { background: #fff; }
div.cell_output .output.stream, div.cell_output pre { font-size: .8rem; }
table { display: block; overflow-x: auto; }
'''


def directives(source):
    "Directive lines of a cell as {word: rest}."
    found = {}
    for line in source.splitlines():
        if not (line.startswith('#|') or line.startswith('# |')): continue
        word, _, rest = line.split('|', 1)[1].strip().partition(' ')
        found[word.rstrip(':')] = rest.strip()
    return found


def undirected(source):
    "Source without its directive lines."
    return '\n'.join(l for l in source.splitlines() if not re.match(r'#\s?\|', l)).strip('\n')


def mended(text):
    "Markdown of `show_doc` without its opening rule and its link attributes."
    return re.sub(r'\{target="_blank"[^}]*\}', '', re.sub(r'\A\s*---\s*\n', '', text))


def shown(output):
    "An output as readers get it."
    data = dict(output.get('data', {}))
    if 'text/markdown' in data: data['text/markdown'] = mended(''.join(data['text/markdown']))
    return output | ({'data': data} if data else {})


def for_readers(book):
    "The notebook without hidden cells and directives; cells marked `echo: false` or calling show_doc keep only their output."
    cells = []
    for cell in book['cells']:
        source = ''.join(cell['source']); words = directives(source) if cell['cell_type'] == 'code' else {}
        if DROPPED & set(words): continue
        cell = cell | {'source': undirected(source) if words else source}
        if cell['cell_type'] == 'code':
            silent = words.get('echo') == 'false' or cell['source'].lstrip().startswith('show_doc(')
            cell |= {'outputs': [shown(o) for o in cell.get('outputs', [])], 'metadata': {'tags': ['remove-input']} if silent else {}}
        if cell['source'].strip(): cells.append(cell)
    return book | {'cells': cells}


def books():
    "Notebooks in reading order, without the index."
    return [b for b in sorted(NBS.glob('*.ipynb'), key=lambda b: b.stem.replace('_', '!')) if b.stem != 'index' and b.name[0] not in '_.']


def toctrees():
    "A table of contents for each part of the book that has notebooks."
    text = ''
    for part, numbers in PARTS.items():
        names = [b.stem for b in books() if b.stem[:2].isdigit() and int(b.stem[:2]) in numbers]
        if names: text += f'```{{toctree}}\n:hidden:\n:caption: {part}\n\n' + '\n'.join(names) + '\n```\n\n'
    return text


def prepare():
    "Fills _proc: notebooks for readers, configuration, style."
    shutil.rmtree(PROC, ignore_errors=True); (PROC / '_static').mkdir(parents=True)
    title = re.search(r'^title *= *(.+)$', (ROOT / 'settings.ini').read_text(encoding='utf-8'), re.M)[1].strip()
    (PROC / 'conf.py').write_text(CONF.format(title=title), encoding='utf-8')
    (PROC / '_static' / 'wsl_nb.css').write_text(CSS, encoding='utf-8')
    for book in [*books(), NBS / 'index.ipynb']:
        nb = for_readers(json.loads(book.read_text(encoding='utf-8')))
        if book.stem == 'index': nb['cells'].append(dict(cell_type='markdown', id='contents', metadata={}, source=toctrees()))
        (PROC / book.name).write_text(json.dumps(nb), encoding='utf-8')
    for folder in NBS.iterdir():
        if folder.is_dir() and folder.name[0] not in '_.': shutil.copytree(folder, PROC / folder.name)


def site():
    "Builds the pages. Returns the exit code of Sphinx."
    prepare(); shutil.rmtree(SITE, ignore_errors=True)
    command = [sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-d', str(PROC / '_build'), '-b', 'html', str(PROC), str(SITE)]
    return subprocess.run(command, cwd=ROOT).returncode


def output_text(output, pictures):
    "One output as Markdown; a picture is added to `pictures` by its file name."
    data = output.get('data', {}); text = lambda kind: ''.join(data[kind]).strip('\n')
    if output['output_type'] == 'stream': return f'```text\n{"".join(output["text"]).strip()}\n```'
    if 'text/markdown' in data: return mended(text('text/markdown'))
    if 'image/png' in data:
        name = f'README_files/{len(pictures)}.png'; pictures[name] = base64.b64decode(text('image/png'))
        return f'![picture]({name})'
    return f'```text\n{text("text/plain")}\n```' if 'text/plain' in data else ''


def readme():
    "README as (text, {file name: bytes of a picture})."
    pictures, parts = {}, []
    for cell in for_readers(json.loads((NBS / 'index.ipynb').read_text(encoding='utf-8')))['cells']:
        if cell['cell_type'] != 'code': parts.append(cell['source']); continue
        if 'tags' not in cell['metadata']: parts.append(f'```python\n{cell["source"]}\n```')
        parts += [output_text(o, pictures) for o in cell['outputs']]
    text = '\n\n'.join(p.strip('\n') for p in parts if p.strip()) + '\n'
    text = re.sub(r'\]\((?!\w+:|#|/|README_files)([^)]+)\)', lambda m: f']({m[1].removeprefix("../") if m[1].startswith("../") else "nbs/" + m[1]})', text)
    return WRITTEN + text, pictures


def readme_files():
    "What stands on disk, in the form of `readme`."
    file = ROOT / 'README.md'
    return file.read_text(encoding='utf-8') if file.exists() else '', {f'README_files/{p.name}': p.read_bytes() for p in (ROOT / 'README_files').glob('*')}


def write_readme():
    "Writes README.md and its pictures."
    text, pictures = readme(); shutil.rmtree(ROOT / 'README_files', ignore_errors=True)
    (ROOT / 'README.md').write_text(text, encoding='utf-8')
    for name, picture in pictures.items(): (ROOT / name).parent.mkdir(exist_ok=True); (ROOT / name).write_bytes(picture)


def main():
    "Command line; see the top of this file."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--check', action='store_true'); parser.add_argument('--readme', action='store_true')
    args = parser.parse_args()
    if not args.check: write_readme(); print('README.md is written')
    if args.readme: return
    code = site(); print('_docs/index.html is written' if not code else 'Sphinx has complaints: see above')
    if args.check and readme() != readme_files(): print('README.md is older than nbs/index.ipynb; run `make docs`'); code = 1
    sys.exit(code)


if __name__ == '__main__': main()
