"""What a firewall has to let through, as a table and in its own words."""

from meshgpu.core.doctor.firewall import firewalld_lines, rules, ufw_lines


def test_rules_name_the_ports_that_are_used_here() -> None:
    found = [(rule.port, rule.protocol, rule.direction) for rule in rules(40001, 7444)]
    assert found == [(40001, "tcp", "both"), (7444, "tcp", "both"), (5353, "udp", "both"), (443, "tcp", "out")]


def test_lines_open_what_comes_in_and_nothing_that_only_goes_out() -> None:
    assert ufw_lines(7443, 7444) == ("sudo ufw allow 7443/tcp", "sudo ufw allow 7444/tcp", "sudo ufw allow 5353/udp")
    assert firewalld_lines(7443, 7444) == (
        "sudo firewall-cmd --permanent --add-port=7443/tcp",
        "sudo firewall-cmd --permanent --add-port=7444/tcp",
        "sudo firewall-cmd --permanent --add-port=5353/udp",
        "sudo firewall-cmd --reload",
    )
