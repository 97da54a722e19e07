"""Networks whose heads and weights are not where their names or the order of registration would
have them.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

SHAPE, CLASSES = (1, 8, 8), 4


class Net(nn.Module):
    """Flat inputs, a hidden layer of 6 features and a classifier, which is registered first."""

    def __init__(self, classes: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.fc = nn.Linear(6, classes)
        self.hidden = nn.Linear(shape[0] * shape[1] * shape[2], 6)

    def forward(self, x):
        return self.fc(self.z(x))

    def z(self, x):
        return F.relu(self.hidden(x.flatten(1)))


class Functional(Net):
    def forward(self, x):
        return F.linear(self.z(x), self.fc.weight, self.fc.bias)


class Wrapped(nn.Module):
    def __init__(self, classes, shape):
        super().__init__()
        self.net = nn.Sequential(nn.Identity(), Net(classes, shape), nn.Identity())

    def forward(self, x):
        return self.net(x)


class Thrown(Net):
    """An auxiliary classifier is the last to run, but nothing becomes of what it says; another is
    never run.
    """

    def __init__(self, classes, shape):
        super().__init__(classes, shape)
        self.auxiliary, self.dead = nn.Linear(6, classes), nn.Linear(6, classes)

    def forward(self, x):
        z = self.z(x)
        logits = self.fc(z)
        self.auxiliary(z)
        return logits


class TrainedAlone(Thrown):
    """An auxiliary classifier runs in training only."""

    def forward(self, x):
        z = self.z(x)
        return self.fc(z) + self.dead(z) * 0 if self.training else self.fc(z)


class Parallel(Net):
    """Two classifiers whose logits are added."""

    def __init__(self, classes, shape):
        super().__init__(classes, shape)
        self.other = nn.Linear(6, classes)
        self.body = nn.Linear(6, 6)

    def forward(self, x):
        z = F.relu(self.body(self.z(x)))
        return (self.other(z) + self.fc(z)) / 2


class Gated(Net):
    """A gate of one number is the last to run."""

    def __init__(self, classes, shape):
        super().__init__(classes, shape)
        self.gate = nn.Linear(6, 1)

    def forward(self, x):
        z = self.z(x)
        return self.fc(z) * self.gate(z).sigmoid()


class Steps(Net):
    """The classifier is called for each row of the image; the logits are the mean."""

    def __init__(self, classes, shape):
        super().__init__(classes, shape)
        self.hidden = nn.Linear(shape[2], 6)

    def forward(self, x):
        return sum(self.fc(self.z(row)) for row in x[:, 0].unbind(1)) / x.shape[2]


class Raw(nn.Module):
    """Weights that are no modules."""

    def __init__(self, classes, shape):
        super().__init__()
        self.b = nn.Parameter(torch.zeros(classes))
        self.w = nn.Parameter(torch.randn(6, classes))
        self.shift = nn.Parameter(torch.zeros(1, 6))
        self.hidden = nn.Parameter(torch.randn(shape[0] * shape[1] * shape[2], 6) / 10)

    def forward(self, x):
        return F.relu(x.flatten(1) @ self.hidden + self.shift) @ self.w + self.b


class Dense(nn.Module):
    """A Linear of a user's own, with its weight the other way round."""

    def __init__(self, inside, outside):
        super().__init__()
        self.kernel, self.offset = (
            nn.Parameter(torch.randn(inside, outside) / 9),
            nn.Parameter(torch.zeros(outside)),
        )

    def forward(self, x):
        return torch.einsum("bi,io->bo", x, self.kernel) + self.offset


class Own(Net):
    def __init__(self, classes, shape):
        super().__init__(classes, shape)
        self.fc = Dense(6, classes)


class Called(Own):
    """A Linear of a user's own that calls torch's function."""

    def __init__(self, classes, shape):
        super().__init__(classes, shape)
        self.fc = CallingDense(6, classes)


class CallingDense(Dense):
    def forward(self, x):
        return F.linear(x, self.kernel.mT, self.offset)


class Calibrated(Net):
    """A number for all logits follows the classifier."""

    def __init__(self, classes, shape):
        super().__init__(classes, shape)
        self.scale = nn.Linear(1, 1)

    def forward(self, x):
        return self.scale(self.fc(self.z(x))[..., None])[..., 0]


class Deep(Net):
    """Two layers that a user may call a head."""

    def __init__(self, classes, shape):
        super().__init__(classes, shape)
        self.end = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, classes))
        del self.fc

    def forward(self, x):
        return self.end(self.z(x))


class Shared(nn.Module):
    """A classifier that has its only parameter from the layer before it."""

    def __init__(self, classes, shape):
        super().__init__()
        self.first = nn.Linear(shape[0] * shape[1] * shape[2], classes)
        self.body = nn.Linear(classes, classes, bias=False)
        self.fc = nn.Linear(classes, classes, bias=False)
        self.fc.weight = self.body.weight

    def forward(self, x):
        return self.fc(F.relu(self.body(self.first(x.flatten(1)))))


class Cosine(Net):
    """Logits are scaled cosines, made of the classifier's weight as a function."""

    def forward(self, x):
        return 5 * F.linear(F.normalize(self.z(x)), F.normalize(self.fc.weight))


class Normed(Net):
    def __init__(self, classes, shape):
        super().__init__(classes, shape)
        self.fc = parametrizations.weight_norm(self.fc)
        self.hidden = parametrizations.spectral_norm(self.hidden)


class Squeezed(nn.Module):
    """A convolution makes the logits; Linears weigh channels before it."""

    def __init__(self, classes, shape):
        super().__init__()
        self.last, self.first = nn.Conv2d(5, classes, 1), nn.Conv2d(shape[0], 5, 3)
        self.weigh = nn.Linear(5, 5)

    def forward(self, x):
        x = F.relu_(self.first(x))
        return self.last(x * self.weigh(x.mean((2, 3))).sigmoid()[:, :, None, None]).mean((2, 3))


class Logs(Net):
    """Something that is not linear follows the classifier."""

    def forward(self, x):
        return self.fc(self.z(x)).tanh()


class Sounds(nn.Module):
    """Rows of an image as a sequence: Conv1d, a transposed one, an LSTM in both directions, a GRU,
    a cell.
    """

    def __init__(self, classes, shape):
        super().__init__()
        self.conv = nn.Conv1d(shape[0] * shape[1], 6, 3, padding=1)
        self.up = nn.ConvTranspose1d(6, 4, 2, stride=2)
        self.lstm = nn.LSTM(4, 3, bidirectional=True, batch_first=True, proj_size=2)
        self.gru = nn.GRU(4, 3, batch_first=True)
        self.cell = nn.RNNCell(3, 3)
        self.fc = nn.Linear(3, classes)

    def forward(self, x):
        x = self.up(F.relu(self.conv(x.flatten(1, 2)))).mT
        h = self.gru(self.lstm(x)[0])[0]
        return self.fc(self.cell(h.mean(1), h[:, -1]))


class Volumes(nn.Module):
    """Conv3d, transposed ones, grouped and depthwise ones, attention to another width, a bilinear
    layer.
    """

    def __init__(self, classes, shape):
        super().__init__()
        self.deep = nn.Conv3d(1, 4, (3, 3, 2))
        self.up3 = nn.ConvTranspose3d(4, 2, 2)
        self.up2 = nn.ConvTranspose2d(6, 8, 2, stride=2, groups=2)
        self.groups = nn.Conv2d(8, 4, 3, groups=2)
        self.depth = nn.Conv2d(4, 4, 3, groups=4)
        self.attend = nn.MultiheadAttention(4, 2, kdim=3, vdim=5, batch_first=True)
        self.pairs = nn.Bilinear(4, 3, 5)
        self.table = nn.Embedding(3, 4)
        self.norm = nn.LayerNorm([2, 5])
        self.fc = nn.Linear(10, classes)

    def forward(self, x):
        y = self.up3(F.relu(self.deep(x.view(-1, 1, 4, 4, 4)))).flatten(1, 2)  # [B, 6, 3, 4]
        y = self.depth(F.relu(self.groups(self.up2(y))))  # [B, 4, 2, 4]
        q, x = y.flatten(2).mT[:, :2] + self.table.weight[:2], x.flatten(1)
        k, v = x[:, :12].view(-1, 4, 3), x[:, 12:32].view(-1, 4, 5)
        a = self.attend(q, k, v, need_weights=False)[0]
        return self.fc(self.norm(self.pairs(a, k[:, :2])).flatten(1))
