"Positions of a pretrained ViT keep their places: class token first, patches row by row, at its own side and at another."
import pytest
import torch

from wsl_nb.cdtr_weights import vit_state


def marked(side, front):
    "A ViT whose position of patch (y,x) is (y,x) in units of the side, and whose tokens in front are marked -1, -2, …"
    y, x = torch.meshgrid((torch.arange(side) + .5) / side, (torch.arange(side) + .5) / side, indexing='ij')
    places = torch.cat([torch.tensor([[-1. - k, -1. - k] for k in range(front)]), torch.stack([y, x], 2).flatten(0, 1)])[None]
    return dict(cls_token=torch.zeros(1, 1, 2), pos_embed=places) | (dict(dist_token=torch.zeros(1, 1, 2)) if front > 1 else {})


@pytest.mark.parametrize('front', (1, 2))
@pytest.mark.parametrize('side', (4, 6, 9))
def test_positions_keep_their_order(side, front):
    "At the same side not a number changes; at another one each patch lies between its neighbours; DeiT's distillation token goes, the class token stays."
    own = marked(6, front); found = vit_state(own, side)['vit.pos_embed']; assert found.shape == (1, 1 + side ** 2, 2) and found[0, 0].tolist() == [-1., -1.]
    patches = found[0, 1:].unflatten(0, (side, side))
    if side == 6: assert torch.equal(patches.flatten(0, 1), own['pos_embed'][0, front:])
    inner = slice(1, -1); wanted = marked(side, 1)['pos_embed'][0, 1:].unflatten(0, (side, side))
    assert (patches - wanted)[inner, inner].abs().max() < .25 / side and (patches.diff(dim=0)[..., 0] > 0).all() and (patches.diff(dim=1)[..., 1] > 0).all()
    assert set(vit_state(own, side)) == {'vit.cls_token', 'vit.pos_embed'}
