"""Every certificate holds, and its control does not."""

import json

import jax
import pytest

from ruvjax.diffusion.certificates import CHECKS, Certificate


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_certificate(check):
    with jax.enable_x64(True):
        certificates = list(check())
    assert certificates
    for certificate in certificates:
        assert certificate.passed, certificate
        assert certificate.control_failed, certificate
        json.dumps([certificate.value, certificate.control_value])


def test_a_value_that_is_no_number_fails():
    certificate = Certificate("nan", float("nan"), (0.0, 1.0), "nan", float("nan"))
    assert not certificate.passed
