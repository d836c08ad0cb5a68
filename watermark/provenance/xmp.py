"""The XMP packet of a generated image: ISO 16684-1, with the IPTC Photo Metadata Standard's properties of 2025.1."""

from xml.etree import ElementTree

X = "adobe:ns:meta/"
RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
DC = "http://purl.org/dc/elements/1.1/"
XMP = "http://ns.adobe.com/xap/1.0/"
IPTC_EXTENSION = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
PREFIXES = {"x": X, "rdf": RDF, "dc": DC, "xmp": XMP, "Iptc4xmpExt": IPTC_EXTENSION}

# The id is fixed by the standard; "r" (read-only) because an edit of the packet breaks the C2PA signature over it.
PACKET_BEGIN = '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
PACKET_END = '\n<?xpacket end="r"?>'

for _prefix, _namespace in PREFIXES.items():
    ElementTree.register_namespace(_prefix, _namespace)


def xmp_packet(
    *, creator_tool: str, created: str, source_type: str, system: str, creator: str | None, prompt: str | None
) -> str:
    """Build the packet, wrapper included. Every text must be writable in XML 1.0; `created` is a date of ISO 8601."""
    root = ElementTree.Element(f"{{{X}}}xmpmeta")
    rdf = ElementTree.SubElement(root, f"{{{RDF}}}RDF")
    description = ElementTree.SubElement(rdf, f"{{{RDF}}}Description", {f"{{{RDF}}}about": ""})
    _add(description, XMP, "CreatorTool", creator_tool)
    _add(description, XMP, "CreateDate", created)
    _add(description, IPTC_EXTENSION, "DigitalSourceType", source_type)
    _add(description, IPTC_EXTENSION, "AISystemUsed", system)
    if prompt is not None:
        _add(description, IPTC_EXTENSION, "AIPromptInformation", prompt)
    if creator:
        creators = ElementTree.SubElement(description, f"{{{DC}}}creator")
        _add(ElementTree.SubElement(creators, f"{{{RDF}}}Seq"), RDF, "li", creator)
    return PACKET_BEGIN + ElementTree.tostring(root, encoding="unicode") + PACKET_END


def _add(parent: ElementTree.Element, namespace: str, name: str, text: str) -> None:
    ElementTree.SubElement(parent, f"{{{namespace}}}{name}").text = text
