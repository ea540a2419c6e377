"""Train a classifier of handwritten digits (scikit-learn's bundled data) and keep the model."""

import argparse
import os

import joblib
from sklearn.datasets import load_digits
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--epochs", type=int, default=8)
options = parser.parse_args()

digits = load_digits()
train_x, test_x, train_y, test_y = train_test_split(digits.data / 16.0, digits.target, test_size=0.25, random_state=0)
gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or "none"
print(f"{len(train_x)} digits to learn from, {len(test_x)} to test on; GPUs granted: {gpus}")

model = MLPClassifier(hidden_layer_sizes=(64,), learning_rate_init=options.lr, random_state=0)
for epoch in range(1, options.epochs + 1):
    for start in range(0, len(train_x), 64):
        model.partial_fit(train_x[start : start + 64], train_y[start : start + 64], classes=range(10))
    loss = log_loss(test_y, model.predict_proba(test_x))
    print(f"epoch {epoch:2}  loss {loss:.4f}  accuracy {model.score(test_x, test_y):.1%}")

joblib.dump(model, "model.joblib")
print("saved model.joblib")
