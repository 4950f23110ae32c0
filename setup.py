"Installs wsl_nb as settings.ini describes it; imports nothing that a bare build environment lacks."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(here / 'settings.ini', encoding='utf-8')
cfg = dict(parser['DEFAULT'])


def lines(key):
    "Values of a multi-line key, one per line."
    return [l.strip() for l in cfg.get(key, '').splitlines() if l.strip()]


readme = here / 'README.md'
setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'].split(),
    author=cfg['author'], license_expression='Apache-2.0', license_files=['LICENSE', 'NOTICE'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else cfg['description'],
    long_description_content_type='text/markdown',
    classifiers=['Programming Language :: Python :: 3', 'Topic :: Scientific/Engineering :: Image Recognition'],
    packages=find_packages(include=['wsl_nb', 'wsl_nb.*']), package_data={'wsl_nb': ['assets/*']},
    python_requires='>=' + cfg['min_python'], install_requires=lines('requirements'),
    extras_require={k.removesuffix('_requirements'): lines(k) for k in cfg if k.endswith('_requirements')},
    entry_points=dict(console_scripts=lines('console_scripts'), nbdev=['wsl_nb=wsl_nb._modidx:d']),
)
