"""The lab: paired campaigns, fidelity verdicts, capsules, ledger, ranking."""


class LabError(ValueError):
    """Bad input, told as "[where] tensor-or-field: expected X, got Y"."""
