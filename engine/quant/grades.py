"""Weight grades under the name that the floors above know; what they compute is in `engine.ops.fp4.grades`."""

from __future__ import annotations

from engine.ops.fp4.grades import Grade, check_grade

__all__ = ["Grade", "check_grade"]
