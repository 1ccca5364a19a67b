"""Arrow's compute functions, which it makes at import, where type checkers do not see them."""

from typing import Any

import pyarrow.compute

pc: Any = pyarrow.compute
