"""Small models, one for each topology of the zoo."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


class ConvNorm(nn.Module):
    """Two convolutions with batch norms, then a Linear behind a flatten of 2 x 2 positions a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.head(torch.relu(self.bn2(self.conv2(x))).flatten(1))


class GroupedConv(nn.Module):
    """A convolution of two groups between two plain ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 1)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2, padding=1)
        self.last = nn.Conv2d(12, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.grouped(torch.relu(self.first(x))))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


class Depthwise(nn.Module):
    """A depthwise convolution passes its units through."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv2d(2, 6, 1), nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6, padding=1)
        self.point = nn.Conv2d(6, 5, 1)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.bn(self.first(x)))))
        return self.head(torch.relu(self.point(x)).mean((2, 3)))


class Residual(nn.Module):
    """One stream, written by two convolutions and read by three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 1)
        self.inner, self.outer = nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.side = nn.Conv2d(6, 3, 1)
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        stream = torch.relu(self.stem(x))
        stream = torch.relu(stream + self.outer(torch.relu(self.inner(stream))))
        pooled = torch.cat([stream.mean((2, 3)), torch.relu(self.side(stream)).mean((2, 3))], 1)
        return self.head(pooled)


class Concat(nn.Module):
    """Two groups share a consumer at different offsets."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 4, 1)
        self.join = nn.Conv2d(7, 5, 1)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], 1)
        return self.head(torch.relu(self.join(joined)).mean((2, 3)))


class Twice(nn.Module):
    """cat[x, x]: two positions a unit."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 5), nn.Linear(10, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.head(torch.relu(self.second(torch.cat([x, x], 1))))


class Transposed(nn.Module):
    """The weight of a transposed convolution has its in axis first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 5, 1)
        self.up = nn.ConvTranspose2d(5, 4, 2, stride=2)
        self.last = nn.Conv2d(4, 3, 1)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.up(torch.relu(self.first(x))))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


class Chunk(nn.Module):
    """Two layers read one half each."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 1)
        self.low, self.high = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 2, 1)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        low, high = torch.relu(self.first(x)).chunk(2, 1)
        joined = torch.cat([torch.relu(self.low(low)), torch.relu(self.high(high))], 1)
        return self.head(joined.mean((2, 3)))


class FusedAttention(nn.Module):
    """One head of self-attention whose q, k and v come from one Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.qkv, self.proj = nn.Linear(6, 12), nn.Linear(4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.embed(x))
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        attended = torch.softmax(q @ k.transpose(-2, -1), -1) @ v
        return self.head(torch.relu(self.proj(attended)).mean(1))


class UnboundAttention(nn.Module):
    """As in timm: q, k and v are taken apart by a reshape and an unbind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.qkv, self.proj = nn.Linear(6, 12), nn.Linear(4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.embed(x))
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 1, -1).permute(2, 0, 3, 1, 4).unbind(0)
        attended = (torch.softmax(q @ k.transpose(-2, -1), -1) @ v).transpose(1, 2).flatten(2)
        return self.head(torch.relu(self.proj(attended)).mean(1))


class MultiHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.hidden, self.head = nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.head(torch.relu(self.hidden(x)).mean(1))


class Recurrent(nn.Module):
    """An LSTM reads a Linear, a Linear reads the LSTM."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.lstm = nn.LSTM(6, 5, batch_first=batch_first)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        if not self.lstm.batch_first:
            x = x.transpose(0, 1)
        out, _ = self.lstm(x)
        return self.head(out.mean(1 if self.lstm.batch_first else 0))


class Glu(nn.Module):
    """A gated linear unit couples position u with u + size / 2."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 8), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(nn.functional.glu(self.first(x), 1))))


class Shuffle(nn.Module):
    """PixelShuffle turns four channels into one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shuffle = nn.Conv2d(2, 8, 1), nn.PixelShuffle(2)
        self.second, self.head = nn.Conv2d(2, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shuffle(torch.relu(self.first(x)))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


class FlattenConcat(nn.Module):
    """A flattened map and a vector side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.vector = nn.Conv2d(2, 3, 1), nn.Linear(4, 5)
        self.join, self.head = nn.Linear(3 * 4 + 5, 6), nn.Linear(6, 3)

    def forward(self, image: Tensor, extra: Tensor) -> Tensor:
        joined = torch.cat([torch.relu(self.conv(image)).flatten(1), torch.relu(self.vector(extra))], 1)
        return self.head(torch.relu(self.join(joined)))


class Normed(nn.Module):
    """A group norm of two groups couples equal offsets, although it neither reads nor writes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 8, 1), nn.GroupNorm(2, 8)
        self.second, self.head = nn.Conv2d(8, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


class Branches(nn.Module):
    """Two branches side by side are added to a third: no unit is written by all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.both = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 4, 1), nn.Conv2d(2, 7, 1)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(torch.cat([self.left(x), self.right(x)], 1) + self.both(x)).mean((2, 3)))


class Shared(nn.Module):
    """Two groups, each of which owns a part of the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.bn = nn.Conv2d(2, 7, 1), nn.BatchNorm2d(7)
        self.left, self.right = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 4, 1)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.both(x))) + torch.cat([self.left(x), self.right(x)], 1)
        return self.head(torch.relu(x).mean((2, 3)))


class Frozen(Mlp):
    """Frozen but for the head, as before fine-tuning."""

    def __init__(self) -> None:
        super().__init__()
        for layer in (self.fc1, self.fc2):
            layer.requires_grad_(False)
