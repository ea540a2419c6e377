"""The IAM policy that renting needs: what the agent, `burst ls`, `burst reap` and `burst setup` call, and no more.

Sources: Service Authorization Reference, "Actions, resources, and condition keys for Amazon EC2"; the shape is that of
Karpenter's policy. It was never tried against AWS.
"""

from typing import Any, Final

INSTANCES: Final = "arn:aws:ec2:*:*:instance/*"
GROUPS: Final = "arn:aws:ec2:*:*:security-group/*"
ANY: Final = "*"


def iam_policy() -> dict[str, Any]:
    """Only what carries a mesh's tag can be rented and ended; the security group is the one that setup made."""
    return {
        "Version": "2012-10-17",
        "Statement": [
            _allow(
                "Look",
                [
                    "ec2:DescribeAvailabilityZones",
                    "ec2:DescribeInstances",
                    "ec2:DescribeInstanceTypeOfferings",
                    "ec2:DescribeInstanceTypes",
                    "ec2:DescribeSecurityGroups",
                    "ec2:DescribeSpotPriceHistory",
                    "ec2:DescribeVpcs",
                    "pricing:GetProducts",
                ],
                ANY,
            ),
            _allow("FindImage", "ssm:GetParameter", "arn:aws:ssm:*::parameter/aws/service/*"),
            # Each call needs an instance as well, and that has to carry the tag: the rest rents nothing by itself.
            _allow(
                "RentInto",
                "ec2:RunInstances",
                [
                    "arn:aws:ec2:*::image/*",
                    "arn:aws:ec2:*:*:network-interface/*",
                    GROUPS,
                    "arn:aws:ec2:*:*:spot-instances-request/*",
                    "arn:aws:ec2:*:*:subnet/*",
                    "arn:aws:ec2:*:*:volume/*",
                ],
            ),
            _allow(
                "Rent",
                "ec2:RunInstances",
                INSTANCES,
                {
                    "StringLike": {"aws:RequestTag/meshgpu:mesh": ANY},
                    "StringEquals": {"ec2:MetadataHttpTokens": "required"},
                },
            ),
            _allow(
                "TagAtBirth",
                "ec2:CreateTags",
                "arn:aws:ec2:*:*:*/*",
                {"StringEquals": {"ec2:CreateAction": ["RunInstances", "CreateSecurityGroup"]}},
            ),
            _allow(
                "EndOwn", "ec2:TerminateInstances", INSTANCES, {"StringLike": {"aws:ResourceTag/meshgpu:mesh": ANY}}
            ),
            _allow("MakeGroup", "ec2:CreateSecurityGroup", [GROUPS, "arn:aws:ec2:*:*:vpc/*"]),
            _allow(
                "AdmitOffice",
                ["ec2:AuthorizeSecurityGroupIngress", "ec2:RevokeSecurityGroupIngress"],
                GROUPS,
                {"StringLike": {"aws:ResourceTag/meshgpu:group": ANY}},
            ),
            _allow(
                "SpotOnce",
                "iam:CreateServiceLinkedRole",
                ANY,
                {"StringEquals": {"iam:AWSServiceName": "spot.amazonaws.com"}},
            ),
        ],
    }


def _allow(
    name: str, action: str | list[str], resource: str | list[str], condition: dict[str, Any] | None = None
) -> dict[str, Any]:
    statement = {"Sid": name, "Effect": "Allow", "Action": action, "Resource": resource}
    return statement | {"Condition": condition} if condition else statement
