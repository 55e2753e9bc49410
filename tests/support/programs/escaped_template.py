"""The process that runs chat templates, with a way out of Jinja's sandbox: `escaped_template.py FOLDER`.

FOLDER holds jinja_process.py, which imports nothing of this program; only what the process may do is left to hold a
template back.
"""

import sys

import jinja2


def main(folder):
    """Answers requests as the real one does."""
    sys.path.insert(0, folder)
    import jinja_process

    jinja_process.compiled = lambda source: jinja2.Environment().from_string(source)
    jinja_process.main()


if __name__ == "__main__":
    main(sys.argv[1])
