"Twenty real pets in the official layout. Skips without WSL_NB_DATA."
import numpy as np
import pytest
from PIL import Image

from test_formats import assert_named
from test_formats_pet import FAULTS, pet_faults
from test_formats_real import copied, real  # noqa: F401 (a fixture)
from wsl_nb.formats import open_set
from wsl_nb.formats_check import check
from wsl_nb.formats_pet import PET_CLASSES, pet_lists, pet_rows

pytestmark = pytest.mark.data


def test_real_pets_are_clean_and_complete(real):  # noqa: F811
    "The check finds nothing; 37 classes, ten images a part, every breed of two or more in val; found from the parent too."
    root = real('oxford-iiit-pet'); data = open_set(root, 'pet')
    assert check(root, 'pet') == [] and (data.name, data.classes) == ('Oxford-IIIT Pet', PET_CLASSES) and open_set(root.parent, 'pet').hash == data.hash
    assert {k: len(v) for k, v in data.splits.items()} == dict(train=7, val=3, trainval=10, test=10)
    rows = {r.name: r for r in pet_rows(pet_lists(root)['list'])[0]}
    assert set(rows) == {*data.splits['trainval'], *data.splits['test']}
    for split in ('trainval', 'test'):
        for s in data.split(split, ('label',)): assert s['label'].sum() == 1 and s['label'].argmax() + 1 == rows[s['id']].kind and PET_CLASSES[rows[s['id']].kind - 1] == s['id'].rsplit('_', 1)[0]


def test_real_trimaps_are_masks(real):  # noqa: F811
    "Each pixel by hand from the file: 1 is class + 1, 2 is 0, 3 is 255; sizes are those of the photographs, some above 512."
    root = real('oxford-iiit-pet'); sizes = []
    for split in ('trainval', 'test'):
        for s in open_set(root, 'pet').split(split):
            with Image.open(root/'annotations'/'trimaps'/f'{s["id"]}.png') as im: values = np.asarray(im)
            mask, kind = s['mask'].numpy(), int(s['label'].argmax()) + 1
            assert mask.shape == s['size'] == tuple(s['image'].shape[1:]) and set(np.unique(mask)) == {0, kind, 255}
            assert all(np.array_equal(values == a, mask == b) for a, b in ((1, kind), (2, 0), (3, 255)))
            sizes.append(max(s['size']))
    assert len(sizes) == 20 and max(sizes) > 512


@pytest.mark.parametrize('fault', FAULTS)
def test_faults_are_named(real, tmp_path, fault):  # noqa: F811
    "Each planted fault, on a copy: among them the dialect 0, 1, 2, 255, a missing trimap and a grey image."
    root = copied(real('oxford-iiit-pet'), tmp_path/'pet'); data = open_set(root, 'pet')
    assert_named(root, 'pet', *pet_faults(root, data.splits['trainval'], data.splits['test'])[fault])
