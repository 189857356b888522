"""Generative networks as their repositories write them: draws, codebooks, flows, rays."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, MultivariateNormal, Normal, kl_divergence

from .training import Maker, Training, assert_trains_within_budgets


class UNetBlock(nn.Module):
    """A level of a U-Net around the level below it, which changes its input in place."""

    def __init__(self, outer: int, inner: int, below: nn.Module | None, given: int = 0) -> None:
        super().__init__()
        self.outermost = given > 0
        down: list[nn.Module] = [nn.Conv2d(given or outer, inner, 4, 2, 1)]
        joined = inner if below is None else 2 * inner
        up: list[nn.Module] = [nn.ReLU(inplace=True), nn.ConvTranspose2d(joined, outer, 4, 2, 1)]
        if not self.outermost:
            down.insert(0, nn.LeakyReLU(0.2, inplace=True))
            up += [nn.BatchNorm2d(outer), nn.Dropout(0.5)]
        self.model = nn.Sequential(*down, *([] if below is None else [below]), *up)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x)
        return y if self.outermost else torch.cat([x, y], 1)


def of_pix2pix() -> Training:
    below = UNetBlock(8, 8, UNetBlock(8, 16, None))
    return Training(UNetBlock(3, 8, below, given=3), (torch.randn(8, 3, 32, 32),))


class Variational(nn.Module):
    """Built of distributions, which look at the values of their parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(36, 32), nn.ReLU())
        self.mean, self.spread = nn.Linear(32, 6), nn.Linear(32, 6)
        self.back = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 36))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.body(x)
        found = Normal(self.mean(y), F.softplus(self.spread(y)) + 1e-3)
        z = found.rsample()
        prior = Normal(torch.zeros_like(z), torch.ones_like(z))
        again = Bernoulli(logits=self.back(z)).log_prob((x > 0.5).float())
        return {"loss": (kl_divergence(found, prior).sum(-1) - again.sum(-1)).mean(), "z": z}


def of_variational_autoencoder() -> Training:
    return Training(Variational(), (torch.rand(48, 36),), cuts="smallest")


class Coupling(nn.Module):
    """Half of the values, chosen by a mask, steer the others; actnorm in front."""

    def __init__(self, width: int, odd: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width // 2, 24), nn.Tanh(), nn.Linear(24, width))
        self.shift, self.log_scale = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.register_buffer("steers", torch.arange(width) % 2 == int(odd))
        self.register_buffer("is_set_up", torch.tensor(1, dtype=torch.uint8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.is_set_up.item() == 0:
            self.shift.data.copy_(-x.mean(0))
        x = (x + self.shift) * self.log_scale.exp()
        kept, others = x[:, self.steers], x[:, ~self.steers]
        shift, scale = self.net(kept).chunk(2, -1)
        y = torch.empty_like(x)
        y[:, self.steers] = kept
        y[:, ~self.steers] = others * torch.tanh(scale).exp() + shift
        return y, torch.tanh(scale).sum(-1) + self.log_scale.sum()


class Flow(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Coupling(width, k % 2 == 1) for k in range(4))
        self.mixes = nn.Parameter(torch.linalg.qr(torch.randn(width, width))[0])

    def forward(self, x: Tensor) -> Tensor:
        volume = x.new_zeros(len(x))
        for layer in self.layers:
            x, more = layer(x)
            x = x @ self.mixes
            volume = volume + more + torch.slogdet(self.mixes)[1]
        prior = MultivariateNormal(torch.zeros(x.shape[1]), torch.eye(x.shape[1]))
        return -(prior.log_prob(x) + volume).mean()


def of_normalizing_flow() -> Training:
    # A mask as an index gives a size that hangs on its values, which a plan provides for.
    return Training(Flow(), (torch.randn(64, 6),), sizes_vary=True)


class Codebook(nn.Module):
    """The nearest code, straight through; codes follow averages, and dead ones begin anew."""

    def __init__(self, codes: int = 16, width: int = 8) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(codes, width))
        self.register_buffer("counts", torch.zeros(codes))
        self.register_buffer("sums", torch.randn(codes, width))

    @torch.no_grad()
    def learn(self, flat: Tensor, chosen: Tensor) -> None:
        self.counts.mul_(0.9).add_(chosen.sum(0), alpha=0.1)
        self.sums.mul_(0.9).add_(chosen.t() @ flat, alpha=0.1)
        self.codes.data.copy_(self.sums / (self.counts[:, None] + 1e-5))
        dead = self.counts < 1e-2
        self.codes[dead] = flat[torch.randint(0, len(flat), dead.shape)][dead]

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        nearest = torch.cdist(flat, self.codes).argmin(1)
        chosen = F.one_hot(nearest, len(self.counts)).type(flat.dtype)
        code = F.embedding(nearest, self.codes)
        code = code.view(len(z), *z.shape[2:], -1).permute(0, 3, 1, 2)
        if self.training:
            self.learn(flat.detach(), chosen)
        used = chosen.mean(0)
        perplexity = torch.exp(-(used * torch.log(used + 1e-10)).sum())
        return z + (code - z).detach(), F.mse_loss(z, code.detach()), perplexity


class Quantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 8, 3, 1, 1))
        self.codebook = Codebook()
        self.up = nn.Sequential(
            nn.Conv2d(8, 16, 3, 1, 1), nn.ReLU(), nn.ConvTranspose2d(16, 3, 2, 2)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        code, off, perplexity = self.codebook(self.down(x))
        again = self.up(code)
        return {"loss": F.mse_loss(again, x) + 0.25 * off, "perplexity": perplexity}


def of_vector_quantized() -> Training:
    return Training(Quantized(), (torch.randn(4, 3, 16, 16),), sizes_vary=True)


class Denoiser(nn.Module):
    """Draws its timesteps and its noise itself."""

    def __init__(self) -> None:
        super().__init__()
        kept = (1 - torch.linspace(1e-4, 0.02, 100)).cumprod(0)
        self.register_buffer("signal", kept.sqrt())
        self.register_buffer("noise", (1 - kept).sqrt())
        self.time = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16))
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1))
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        t = torch.randint(0, len(self.signal), (len(x),)).long()
        drawn = torch.randn_like(x)
        signal, noise = self.signal[t], self.noise[t]
        noisy = signal.view(-1, 1, 1, 1) * x + noise.view(-1, 1, 1, 1) * drawn
        waves = t[:, None] * torch.exp(-math.log(1e4) * torch.arange(8) / 7)
        when = self.time(torch.cat([waves.sin(), waves.cos()], -1))
        y = self.first(noisy)
        for block in self.blocks:
            y = y + block(y + when[:, :, None, None])
        return F.mse_loss(self.last(y), drawn)


def of_diffusion() -> Training:
    return Training(Denoiser(), (torch.randn(4, 3, 16, 16),))


class Radiance(nn.Module):
    """Points along rays, embedded by a list of functions, and rendered."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.waves = [
            lambda x, f=float(f), p=p: p(x * f) for f in (1, 2, 4) for p in (torch.sin, torch.cos)
        ]
        sizes = [21, width, width, width + 21, width]
        self.layers = nn.ModuleList(nn.Linear(size, width) for size in sizes)
        self.density, self.colour = nn.Linear(width, 1), nn.Linear(width, 3)

    def forward(self, start: Tensor, ray: Tensor, points: int = 8) -> Tensor:
        at = torch.linspace(2.0, 6.0, points) + 0.5 * torch.rand(len(start), points)
        where = start[:, None] + ray[:, None] * at[..., None]
        y = given = torch.cat([where, *(wave(where) for wave in self.waves)], -1)
        for k, layer in enumerate(self.layers):
            y = F.relu(layer(torch.cat([given, y], -1) if k == 3 else y))
        far = torch.cat([at[:, 1:] - at[:, :-1], torch.tensor([1e10]).expand(len(at), 1)], -1)
        seen = 1 - torch.exp(-F.relu(self.density(y)[..., 0]) * far)
        through = torch.cat([torch.ones(len(at), 1), 1 - seen + 1e-10], -1).cumprod(-1)[:, :-1]
        return ((seen * through)[..., None] * torch.sigmoid(self.colour(y))).sum(-2)


def of_radiance_field() -> Training:
    return Training(Radiance(), (torch.randn(32, 3), torch.randn(32, 3)))


MODELS: dict[str, Maker] = {
    name.removeprefix("of_"): make for name, make in globals().items() if name.startswith("of_")
}


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_within_budgets(name: str) -> None:
    torch.manual_seed(0)
    assert_trains_within_budgets(MODELS[name]())
