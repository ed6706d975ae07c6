"""Evaluates a model: `python eval.py checkpoint=RUN [key=value ...]`; configs/eval.yaml says what there is.

Logs go to stderr; the last line on stdout is the result as JSON.
"""

import hydra

from dinat import cli

if __name__ == "__main__":
    cli.run(hydra.main(version_base="1.3", config_path="configs", config_name="eval")(cli.eval_job))
