"""The contracts as validators that refuse what they do not list.

A contract leaves room for fields that are yet to come, since clients have to bear them. What is sent today has to be
listed, so the tests close every object whose fields are known.
"""

import jsonschema
from jsonschema.exceptions import best_match
from referencing import Registry
from referencing.jsonschema import DRAFT202012

PLACE = "https://contract.invalid/"

COMBINING = ("allOf", "oneOf", "anyOf")


class Contracts:
    """Documents by their file names, which may refer to each other."""

    def __init__(self, documents):
        self.documents = documents
        resources = [(PLACE + name, DRAFT202012.create_resource(self.closed(name))) for name in documents]
        self.registry = Registry().with_resources(resources)
        self.validators = {}

    def find(self, name, reference):
        """The document in which a reference ends, and what is there."""
        file, _, pointer = reference.partition("#")
        name = file.removeprefix("./") or name
        found = self.documents[name]
        for step in pointer.strip("/").split("/"):
            found = found[step.replace("~1", "/").replace("~0", "~")]
        return name, found

    def closed(self, name):
        """A document whose schemas are closed, but for their outermost level, which may be part of another schema."""
        document = self.documents[name]
        components = document.get("components", {})
        schemas = {key: self.close(name, schema) for key, schema in components.get("schemas", {}).items()}
        channels = {
            key: {
                **channel,
                "messages": {
                    kind: {**message, "payload": self.close(name, message["payload"])}
                    for kind, message in channel["messages"].items()
                },
            }
            for key, channel in document.get("channels", {}).items()
        }
        return {**document, "components": {**components, "schemas": schemas}, "channels": channels}

    def close(self, name, schema, whole=False):
        """A schema, of which the objects inside are closed, and with `whole` it itself."""
        if not isinstance(schema, dict):
            return schema
        out = dict(schema)
        for key, value in schema.items():
            if key == "properties":
                out[key] = {field: self.close(name, inner, True) for field, inner in value.items()}
            elif key in ("items", "additionalProperties"):
                out[key] = self.close(name, value, True)
            elif key in COMBINING:
                out[key] = [self.close(name, inner) for inner in value]
        if whole and self.lists_fields(name, schema):
            out.setdefault("unevaluatedProperties", False)
        return out

    def lists_fields(self, name, schema):
        if "properties" in schema:
            return True
        if "$ref" in schema:
            return self.lists_fields(*self.find(name, schema["$ref"]))
        return any(self.lists_fields(name, inner) for key in COMBINING for inner in schema.get(key, []))

    def check(self, value, reference):
        """Fails unless the value is what the schema at `file.yaml#/path` says."""
        if reference not in self.validators:
            schema = {"$ref": PLACE + reference}
            if self.lists_fields("", {"$ref": reference}):
                schema["unevaluatedProperties"] = False
            self.validators[reference] = jsonschema.Draft202012Validator(schema, registry=self.registry)
        error = best_match(self.validators[reference].iter_errors(value))
        assert error is None, f"{reference}: {error.json_path}: {error.message}\n{value}"
