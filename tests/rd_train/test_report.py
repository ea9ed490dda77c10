"""The curves of a finished run."""

from rd_train.report import curves


def test_curves_are_terms_of_the_loss_and_accuracies():
    row = {"phase": "student", "epoch": 1, "step": 9, "lr": 0.1, "muon_lr": 0.02, "loss": 1.2, "ce": 1.0, "kd": 0.4}
    row |= {"gradient_norm": 2.0, "seconds": 3.0, "images_per_second": 9.0, "train_accuracy": 0.5, "val_accuracy": 0.6}
    rows = [row | {"val_loss": 1.1}, row | {"epoch": 2, "val_loss": 1.0}]
    result = {"arch": "plain20", "method": "rd", "data": "digits", "test_accuracy": 0.7, "teacher_test_accuracy": None}
    losses, accuracies = curves(rows, result).axes
    assert [line.get_label() for line in losses.lines] == ["loss", "ce", "kd", "validation cross-entropy"]
    assert [line.get_label() for line in accuracies.lines] == [
        "student, training",
        "student, validation",
        "student, test",
    ]
