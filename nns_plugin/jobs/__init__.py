"""What people ask for, made of the parts: needs the extra ``cli``."""

from importlib.util import find_spec

from nns_plugin.errors import MissingExtraError

for _module, _extra in (("pydantic", "cli"), ("sklearn", "cli"), ("yaml", "cli")):
    if find_spec(_module) is None:
        raise MissingExtraError(_module, _extra)
