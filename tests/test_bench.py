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


@pytest.mark.parametrize('method, named', [('more', ('PAR', 'CRE', 'URE', 'training step', 'operations')), ('affinity', ('random walk', 'pair distances', 'multi-scale CAM', 'CRF')),
                                            ('cdtr', ('training step', 'losses', 'attention', 'boxes')), ('surgery', ('feature surgery', 'image path', 'text vectors', 'training step')),
                                            ('fsgr', ('beam search', 'geometry', 'contrast', 'five sentences', 'CIDEr-D', 'reward'))])
def test_plain_and_fast_forms_agree(tmp_path, capsys, method, named):
    record = tmp_path / 'result.json'
    assert bench.main([method, '--quick', '--out', str(record)]) == 0, capsys.readouterr().out
    found = json.loads(record.read_text())
    assert found['cpu'] and found['threads'] == 1 and all(r['agrees'] for r in found['rows']) and str(tmp_path) not in record.read_text()
    compared = [r['name'] for r in found['rows'] if r['error'] is not None]
    for what in named: assert any(what in n for n in compared), what


def test_peaks_of_memory_are_those_of_known_tensors():
    from bench_affinity import resident_peak, tensor_peak
    def two(): # 8 MB, then 16 MB beside it that are gone at the end
        a = torch.ones(2 * 2 ** 20); b = torch.ones(4 * 2 ** 20)
        return a + b[:len(a)]
    two(); tensors, resident = tensor_peak(two), resident_peak(two)
    assert tensors == pytest.approx(32, abs=.1) and (resident is None or resident == pytest.approx(32, abs=4))


def test_a_difference_is_told():
    assert not bench.Row('x', 1., 1., error=1e-3, allowed=1e-4).agrees and not bench.Row('x', error=float('nan'), allowed=1.).agrees
    assert bench.gap(torch.ones(2), torch.tensor([1., 1.5])) == .5
