"Own photographs through the command line: every kind of file that telephones, scanners and spreadsheets leave behind."
import json, re, shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from test_cli import refused
from test_more import as_yaml
from wsl_nb import cli, more_recipe, training
from wsl_nb.core import read_image, read_mask
from wsl_nb.data import embedded
from wsl_nb.formats import open_set
from wsl_nb.formats_write import export
from wsl_nb.metrics import read_results
from wsl_nb.training_checkpoint import checkpoint

FORMS = dict(JPG='RGB', png='RGBA', jpeg='L', GIF='P', PNG='I;16', tif='I;16', webp='RGB', bmp='RGB') # Ending -> mode
CLASSES = ['Bär', 'red kite'] # A letter that is no ASCII, a space


def photograph(path, kind, size=(70, 50), mode='RGB', turn=1):
    "A disc on a ground, blue for one class and red for the other; `turn` is the EXIF tag that makes it upright again."
    height, width = size
    y, x = np.mgrid[:height, :width]
    disc = ((y - height / 2) ** 2 + (x - width / 2) ** 2 < (min(size) / 3) ** 2)[..., None]
    pixels = np.where(disc, ([40, 60, 230], [230, 60, 40])[kind], ([150, 170, 120], [120, 150, 170])[kind]).astype(np.uint8)
    im = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257) if mode == 'I;16' else Image.fromarray(pixels).convert(mode)
    if mode == 'RGBA': im.putalpha(Image.fromarray((255 * disc[..., 0]).astype(np.uint8)))
    exif = Image.Exif(); exif[274] = turn
    path.parent.mkdir(parents=True, exist_ok=True); im.save(path, **(dict(exif=exif) if turn != 1 else {}))


@pytest.fixture(scope='module')
def album(tmp_path_factory):
    "Eight kinds of files in each of two class folders, sizes and proportions mixed, one picture lying on its side."
    root = tmp_path_factory.mktemp('own')/'Fotos été 2024'
    for kind, name in enumerate(CLASSES):
        for i, (ending, mode) in enumerate(FORMS.items()): photograph(root/name/f'Ünser Bild {i}.{ending}', kind, (60 + 9 * i, 110 - 8 * i), mode, turn=6 if ending == 'JPG' else 1)
    return root


@pytest.fixture
def words(album, tmp_path):
    "Command that trains the smallest recipe on the album, and its run folder."
    out = tmp_path/'run'
    return ['train', 'more', '--config', str(as_yaml(tmp_path, layout='folder')), '--data', str(album), '--out', str(out)], out


@pytest.fixture(scope='module')
def run(album, tmp_path_factory):
    "A finished run on the album."
    folder = tmp_path_factory.mktemp('run'); out = folder/'run'
    assert cli.main(['train', 'more', '--config', str(as_yaml(folder, layout='folder')), '--data', str(album), '--out', str(out)]) == 0
    return out


def test_every_kind_of_file_is_clean_and_looks_alike(album, capsys):
    "The check is content; a picture has the same brightness whatever its file: 16 bits are not cut to white, what alpha hides is not black, and all stand upright."
    assert cli.main(['data', 'check', 'folder', str(album)]) == 0 and 'complete and sound' in capsys.readouterr().out
    data = open_set(album, 'folder'); assert list(data.classes) == CLASSES
    samples = {s['id']: s for split in data.splits for s in data.split(split)}; assert len(samples) == 16
    for i, (ending, mode) in enumerate(FORMS.items()):
        s = samples[f'Bär/Ünser Bild {i}']; size = (60 + 9 * i, 110 - 8 * i)
        assert s['size'] == (size[::-1] if ending == 'JPG' else size) and s['label'].tolist() == [1, 0]
        for place, colour, grey in ((tuple(n // 2 for n in s['size']), [40, 60, 230], 73), ((2, 2), [150, 170, 120], 158)): # disc and ground
            want = {'L': grey, 'I;16': colour[0]}.get(mode, colour)
            assert np.abs(255 * s['image'][:, place[0], place[1]].numpy() - want).max() < 36, (ending, place) # the palette of the GIF has steps of 51


def test_a_run_knows_its_classes_and_is_scored_by_tags_alone(run, album, capsys):
    "classes.json, a result with tags F1 and nothing that needs masks, the same from `eval`; other protocols are refused, since they do."
    assert json.loads((run/'classes.json').read_text(encoding='utf-8')) == CLASSES
    assert cli.main(['eval', 'more', '--run', str(run), '--data', str(album), '--checkpoint', 'last']) == 0
    record, = read_results(run/'eval_val.json'); result = json.loads((run/'result.json').read_text())['records'][-1]
    assert record.metric == result['metric'] == 'tags F1' and record.value == result['value'] and record.images == 2 and 0 <= record.value <= 1
    assert record.dataset == album.name and record.protocol['tags'] == 'none'
    code, text = refused(capsys, 'eval', 'more', '--run', run, '--data', album, '--protocol', 'decoder'); assert code == 2 and 'mask' in text


def test_other_photographs_of_any_size(run, tmp_path, capsys):
    "Portrait, lying on its side, larger than 2000 pixels, grey of 16 bits: label maps have the size of the upright picture."
    inbox = tmp_path/'Neue Bilder'
    photograph(inbox/'a portrait.jpg', 0, (120, 40)); photograph(inbox/'b lying.JPEG', 1, (60, 130), turn=8)
    photograph(inbox/'c große.jpg', 0, (1500, 2100)); photograph(inbox/'d deep.png', 1, (64, 64), 'I;16'); photograph(inbox/'e strip.png', 1, (30, 300))
    assert cli.main(['predict', 'more', '--run', str(run), '--out', str(tmp_path/'out'), str(inbox)]) == 0
    files = sorted(inbox.iterdir())
    for i, file in enumerate(files): assert read_mask(tmp_path/'out'/f'{i:03d}_{file.stem}_labels.png', 3).shape == read_image(file, exif=True).shape[:2]
    assert [read_image(f, exif=True).shape[:2] for f in files] == [(120, 40), (130, 60), (1500, 2100), (64, 64), (30, 300)]
    page = (tmp_path/'out'/'report.html').read_text(encoding='utf-8'); assert all(f.name in page for f in files)
    assert len(list((tmp_path/'out').glob('*_maps.png'))) == 5 and max((tmp_path/'out').iterdir(), key=lambda p: p.stat().st_size).stat().st_size < 5e6


def test_a_run_goes_on_after_an_interruption(words, run, monkeypatch, capsys):
    "Ctrl-C ends with 130; the same line with --resume ends in the weights of the run that was never interrupted."
    words, out = words; update, count = training.Run.update, []
    def interrupted(self, *args, **kwargs):
        update(self, *args, **kwargs); count.append(1)
        if len(count) == 5: raise KeyboardInterrupt
    monkeypatch.setattr(training.Run, 'update', interrupted)
    assert cli.main(words) == 130 and (out/'classes.json').exists() and not (out/'result.json').exists()
    monkeypatch.undo()
    code, text = refused(capsys, *words); assert code == 2 and 'goes on with that run' in text
    assert cli.main([*words, '--resume']) == 0
    a, b = (load_file(checkpoint(r)/'model.safetensors') for r in (out, run)); assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)


def test_a_table_with_several_labels_a_picture(album, tmp_path, capsys):
    "Spreadsheet form with splits: trained, scored on val and on test."
    root = tmp_path/'table'; shutil.copytree(album, root); files = sorted(p.relative_to(root).as_posix() for p in root.rglob('*.*'))
    rows = [f'{f},{f.split("/")[0]}{";sky" if i % 2 else ""},{("train", "train", "val", "test")[i % 4]}' for i, f in enumerate(files)]
    (root/'labels.csv').write_text('\ufeffFile,Labels,Split\r\n' + '\r\n'.join(rows), encoding='utf-8')
    assert cli.main(['data', 'check', 'folder', str(root)]) == 0, capsys.readouterr().out
    out = tmp_path/'run'; assert cli.main(['train', 'more', '--config', str(as_yaml(tmp_path, layout='folder', steps=2)), '--data', str(root), '--out', str(out)]) == 0
    assert json.loads((out/'classes.json').read_text(encoding='utf-8')) == [*CLASSES, 'sky']
    for split, images in (('val', 4), ('test', 4)):
        assert cli.main(['eval', 'more', '--run', str(out), '--data', str(root), '--split', split]) == 0
        assert [(r.metric, r.images, r.split) for r in read_results(out/f'eval_{split}.json')] == [('tags F1', images, split)]


def spoilt(album, root, change):
    "A copy of the album with a fault."
    shutil.copytree(album, root); change(root); return root


def cut(root): file = root/'Bär'/'Ünser Bild 2.jpeg'; file.write_bytes(file.read_bytes()[:400])
def no_image(root): (root/'Bär'/'Ünser Bild 6.webp').write_text('I am a text')
def one_class(root): shutil.rmtree(root/'Bär')
def film(root): (root/'Bär'/'Urlaub.mp4').write_bytes(b'\0' * 99)
def note(root): (root/'red kite'/'notes.txt').write_text('Sunday')
def floats(root): Image.fromarray(np.ones((60, 60), np.float32)).save(root/'Bär'/'depth.tif')


@pytest.mark.parametrize('change, says, stops', [(cut, 'Ünser Bild 2.jpeg', True), (no_image, 'Ünser Bild 6.webp', True), (one_class, 'one class only', True), (floats, 'depth.tif', True),
                                                 (film, 'Urlaub.mp4', False), (note, 'notes.txt', False)], ids=lambda v: getattr(v, '__name__', ''))
def test_faults_are_named_before_and_during_training(album, tmp_path, capsys, change, says, stops):
    "`data check` ends with 2 and names the file; a picture that cannot be read stops the run with 2 and its name, a file that is no picture does not."
    root = spoilt(album, tmp_path/'album', change)
    assert cli.main(['data', 'check', 'folder', str(root)]) == 2 and says in (out := capsys.readouterr().out) and 'cure' in out
    line = ['train', 'more', '--config', str(as_yaml(tmp_path, layout='folder', evaluate_every=1)), '--data', str(root), '--out', str(tmp_path/'run')]
    if not stops: assert cli.main([*line, '--steps', '1']) == 0
    else:
        code, text = refused(capsys, *line); assert code == 2 and says in text and 'cure' in text


def test_a_layout_that_does_not_exist(album, words, capsys, tmp_path):
    "Both commands list those that do; a recipe for drawn data says how to name the layout of a folder."
    for line in (['data', 'check', 'pictures', album], [*words[0], '--layout', 'pictures']):
        code, text = refused(capsys, *line); assert code == 2 and 'folder' in text and 'pictures' in text
    code, text = refused(capsys, 'train', 'more', '--data', album, '--out', tmp_path/'x'); assert code == 2 and '--layout folder' in text


def test_a_picture_that_may_fill_the_memory(run, album, tmp_path, capsys, monkeypatch):
    "A file of very many pixels is refused by name, in `predict` and in the check."
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 7600) # twice as many are refused; the album has less
    root = spoilt(album, tmp_path/'album', lambda root: photograph(root/'Bär'/'poster.png', 0, (140, 120)))
    code, text = refused(capsys, 'predict', 'more', '--run', run, '--out', tmp_path/'out', root/'Bär'/'poster.png'); assert code == 2 and 'poster.png' in text and 'smaller' in text
    assert cli.main(['data', 'check', 'folder', str(root)]) == 2 and 'poster.png' in capsys.readouterr().out


def test_a_run_without_masks_can_be_scored_where_there_are_some(tmp_path, monkeypatch):
    "Trained on class folders, scored on the same classes in the VOC layout, as the how-to says."
    monkeypatch.setenv('WSL_NB_CACHE', str(tmp_path/'cache')); farm = embedded('wsol', train=8, val=3, test=0, size=64)
    for layout in ('folder', 'voc'): export(farm, layout, tmp_path/layout)
    assert cli.main(['train', 'more', '--config', str(as_yaml(tmp_path, layout='folder', steps=2)), '--data', str(tmp_path/'folder'), '--out', str(tmp_path/'run')]) == 0
    model, cfg = more_recipe.load_run(tmp_path/'run', len(farm.classes)); drawn = open_set(tmp_path/'voc', 'voc')
    assert drawn.classes == open_set(tmp_path/'folder', 'folder').classes
    found = {r.metric: r.value for r in more_recipe.evaluate(model, drawn.split('val'), cfg)}
    assert 0 <= found['LAM mIoU'] <= 100 and 0 <= found['tags F1'] <= 1


def test_commands_of_the_how_to_are_understood(root):
    "Every `wsl-nb` line of the notebook parses; the one that says *as here* is the recipe that the notebook trains."
    cells = json.loads((root/'nbs'/'02f_more_own_photographs.ipynb').read_text(encoding='utf-8'))['cells']; shell = '\n'.join(re.findall(r'```sh\n(.*?)```', '\n'.join(''.join(c['source']) for c in cells), re.S))
    lines = [l for l in shell.splitlines() if l.startswith('wsl-nb ')]; parsed = {}
    for line in lines:
        args, flags = cli.build_parser().parse_known_args(line.split('#')[0].split()[1:])
        assert not flags or args.command == 'train'
        if args.command == 'train': parsed[line] = cli.recipe(cli.presets(cli.method(args.method))[args.preset], flags)
    assert len(lines) >= 6 and len(parsed) == 3
    code = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'code'); scope = dict(SIDE=int(re.search(r'SIDE = (\d+)', code)[1]), LAPTOP=more_recipe.LAPTOP)
    small = eval(re.search(r'^small = (dict\(.*\))$', code, re.M)[1], scope); here = next(cfg for line, cfg in parsed.items() if 'as here' in line)
    assert all(getattr(here, k) == v for k, v in small.items())
