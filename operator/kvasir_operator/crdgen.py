"""`python -m kvasir_operator.crdgen`: writes crds/, the chart's copies and docs/api.md.

`generated` is the content of every file, so that a test compares it with what is committed.
"""

import sys
from pathlib import Path

import yaml

from kvasir_operator import api_docs
from kvasir_operator.api import GROUP, KINDS
from kvasir_operator.crd_schema import crd

HEADER = "# Generated from operator/kvasir_operator/api.py by `make gen`; do not edit.\n"
CHART_ANNOTATIONS = """\
  annotations:
    {{- if .Values.crds.keep }}
    helm.sh/resource-policy: keep
    {{- end }}
    kvasir.dev/chart-version: {{ .Chart.Version | quote }}
"""


class _PlainDumper(yaml.SafeDumper):
    """Writes repeated values out: a CRD with YAML anchors is hard to read and to template."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def generated() -> dict[str, str]:
    """Content by path, relative to the root of the repository."""
    files = {"docs/api.md": api_docs.render()}
    for kind in KINDS:
        text = yaml.dump(
            crd(kind), Dumper=_PlainDumper, sort_keys=False, width=96, allow_unicode=True
        )
        name = f"{GROUP}_{kind.plural}.yaml"
        files[f"crds/{name}"] = HEADER + text
        files[f"helm/kvasir/templates/crds/{name}"] = _chart_copy(text)
    return files


def _chart_copy(text: str) -> str:
    """The CRD as a template: `helm upgrade` brings it up to date, `crds.keep` guards it."""
    assert "{{" not in text, "a CRD must not contain template marks"
    head, rest = text.split("spec:\n", 1)
    return (
        f"{{{{- if .Values.crds.install }}}}\n{HEADER}{head}{CHART_ANNOTATIONS}"
        f"spec:\n{rest}{{{{- end }}}}\n"
    )


def main(root: Path) -> None:
    """Write all files below `root`."""
    for path, text in generated().items():
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path.cwd())
