"""A validation as JUnit XML, for build servers."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from nns_plugin.jobs.validation.result import Validation
from nns_plugin.jobs.validation.tables import facts

SUITE = "nns validate"
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # in XML 1.0


def junit(found: Validation) -> str:
    """The checks as test cases; a check that fails is a failure."""
    checks = found.verdict.checks
    suite = _suite(tests=len(checks), failures=len(found.verdict.failures), errors=0)
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in facts(found.comparison):
        ElementTree.SubElement(properties, "property", name=name, value=value)
    for check in checks:
        case = ElementTree.SubElement(suite, "testcase", classname=f"nns.{check.subject}", name=check.name)
        if check.passed:
            ElementTree.SubElement(case, "system-out").text = check.text
        else:
            ElementTree.SubElement(case, "failure", message=check.text, type=check.subject)
    return _xml(suite)


def junit_of_error(error: BaseException) -> str:
    """One test case that ended with an error."""
    suite = _suite(tests=1, failures=0, errors=1)
    case = ElementTree.SubElement(suite, "testcase", classname="nns", name="comparison")
    ElementTree.SubElement(case, "error", message=" ".join(str(error).split()), type=type(error).__name__)
    return _xml(suite)


def _suite(**counts: int) -> ElementTree.Element:
    return ElementTree.Element("testsuite", {"name": SUITE} | {name: str(count) for name, count in counts.items()})


def _xml(suite: ElementTree.Element) -> str:
    root = ElementTree.Element("testsuites")
    root.append(suite)
    for element in root.iter():
        element.attrib.update({name: _FORBIDDEN.sub("\ufffd", value) for name, value in element.attrib.items()})
        element.text = element.text and _FORBIDDEN.sub("\ufffd", element.text)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True)
