"""What accounts are called, inside and to their tenants."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay import account, tenant

names = st.from_regex(account.NAME, fullmatch=True).filter(account.is_name)
tenants = st.from_regex(tenant.NAME, fullmatch=True).filter(lambda one: not one.endswith("\n"))


@given(tenants, names)
def test_a_name_of_a_tenant_is_found_again_in_what_relay_makes_of_it(tenant, name):
    made = account.inner(tenant, name)
    assert (account.owner(made), account.shown(made)) == (tenant, name)
    assert account.is_inner(made)
    assert not account.is_name(made)
    assert re.fullmatch(r"[a-z0-9._-]+", made), "it stands in URLs"


@given(names)
def test_an_account_of_the_configuration_is_called_the_same_by_everybody(name):
    assert (account.owner(name), account.shown(name)) == (None, name)
    assert not account.is_inner(name)


@given(st.tuples(tenants, names), st.tuples(tenants, names))
def test_no_two_tenants_names_become_one(one, other):
    assert (account.inner(*one) == account.inner(*other)) is (one == other)


@given(tenants, names, names)
def test_what_a_tenant_may_mean_is_its_own_or_the_configurations(tenant, name, other):
    meant = account.meant(tenant, name)
    assert set(meant) == {account.inner(tenant, name), name}
    assert {account.shown(one) for one in meant} == {name}
    assert account.meant(tenant, account.inner(other, name)) == []


@pytest.mark.parametrize(
    "text", ["", ".", "a.", ".a", "a.b.c", "A.b", "a.b\n", "a\0.b", "-a.b", "a." + "b" * 65]
)
def test_what_cannot_be_an_added_account_is_not_looked_for(text):
    assert not account.is_inner(text)
