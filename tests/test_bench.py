"The benchmark's plain and fast forms agree, at small sizes; no test looks at a ratio."
import json

import pytest
import torch

import bench


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_plain_and_fast_forms_of_more_agree(tmp_path, capsys):
    record = tmp_path / 'result.json'
    assert bench.main(['more', '--quick', '--out', str(record)]) == 0, capsys.readouterr().out
    found = json.loads(record.read_text())
    assert found['cpu'] and found['threads'] == 1 and all(r['agrees'] for r in found['rows']) and str(tmp_path) not in record.read_text()
    compared = [r['name'] for r in found['rows'] if r['error'] is not None]
    for what in ('PAR', 'CRE', 'URE', 'training step', 'operations'): assert any(what in n for n in compared), what


def test_a_difference_is_told():
    assert not bench.Row('x', 1., 1., error=1e-3, allowed=1e-4).agrees and not bench.Row('x', error=float('nan'), allowed=1.).agrees
    assert bench.gap(torch.ones(2), torch.tensor([1., 1.5])) == .5
