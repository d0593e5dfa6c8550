"""For the process that tests' ranks are forked from: what each would import and load first, once for all of them.

A rank that imports for itself takes two seconds of a core, in tests that start some two hundred.
"""

from octavo.workers.preparation import import_for

import_for("cpu")  # it takes nothing of a GPU
