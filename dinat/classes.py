"""Classes of the data sets that published models for dense prediction are of: names in index order, ids, things.

Sources: the categories of COCO's annotation files; objectInfo150 of ADE20K with the synonyms that Mask2Former keeps,
and its things; cityscapesscripts; config.json of Mapillary Vistas 1.2.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Classes:
    """The classes of a data set in the order in which models number them.

    Attributes:
        names: of the classes.
        ids: what the data set's annotation files call them (Cityscapes: `labelId`).
        things: whether a class has instances.
    """

    names: tuple[str, ...]
    ids: tuple[int, ...]
    things: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.names)

    def only_things(self) -> Classes:
        """Those that have instances, in the same order."""
        kept = [i for i, thing in enumerate(self.things) if thing]
        return Classes(*(tuple(column[i] for i in kept) for column in (self.names, self.ids, self.things)))


def _classes(names: str, ids: Iterable[int], things: Container[int]) -> Classes:
    """Of names that semicolons separate, their ids, and the ids of things."""
    ids = tuple(ids)
    return Classes(tuple(names.replace("\n", " ").split("; ")), ids, tuple(number in things for number in ids))


_COCO_ABSENT = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}  # of the ids to 91, those that no release has
_COCO_STUFF = (
    92, 93, 95, 100, 107, 109, 112, 118, 119, 122, 125, 128, 130, 133, 138, 141, 144, 145, 147, 148, 149, 151, 154, 155,
    156, 159, 161, 166, 168, 171, 175, 176, 177, 178, 180, 181, *range(184, 201),
)  # fmt: skip
_COCO_THINGS = [number for number in range(1, 92) if number not in _COCO_ABSENT]

_ADE20K_STUFF = (
    0, 1, 2, 3, 4, 5, 6, 9, 11, 13, 16, 17, 21, 25, 26, 28, 29, 34, 40, 46, 48, 51, 52, 54, 59, 60, 61, 63,
    68, 77, 79, 84, 91, 94, 96, 99, 100, 101, 105, 106, 109, 113, 114, 117, 122, 128, 131, 140, 141, 145,
)  # fmt: skip

COCO_PANOPTIC = _classes(
    """\
person; bicycle; car; motorcycle; airplane; bus; train; truck; boat; traffic light; fire hydrant; stop sign; parking
meter; bench; bird; cat; dog; horse; sheep; cow; elephant; bear; zebra; giraffe; backpack; umbrella; handbag; tie;
suitcase; frisbee; skis; snowboard; sports ball; kite; baseball bat; baseball glove; skateboard; surfboard; tennis
racket; bottle; wine glass; cup; fork; knife; spoon; bowl; banana; apple; sandwich; orange; broccoli; carrot; hot dog;
pizza; donut; cake; chair; couch; potted plant; bed; dining table; toilet; tv; laptop; mouse; remote; keyboard; cell
phone; microwave; oven; toaster; sink; refrigerator; book; clock; vase; scissors; teddy bear; hair drier; toothbrush;
banner; blanket; bridge; cardboard; counter; curtain; door-stuff; floor-wood; flower; fruit; gravel; house; light;
mirror-stuff; net; pillow; platform; playingfield; railroad; river; road; roof; sand; sea; shelf; snow; stairs; tent;
towel; wall-brick; wall-stone; wall-tile; wall-wood; water-other; window-blind; window-other; tree-merged;
fence-merged; ceiling-merged; sky-other-merged; cabinet-merged; table-merged; floor-other-merged; pavement-merged;
mountain-merged; grass-merged; dirt-merged; paper-merged; food-other-merged; building-other-merged; rock-merged;
wall-other-merged; rug-merged""",
    [*_COCO_THINGS, *_COCO_STUFF],
    _COCO_THINGS,
)
COCO = COCO_PANOPTIC.only_things()

ADE20K = _classes(
    """\
wall; building; sky; floor; tree; ceiling; road, route; bed; window; grass; cabinet; sidewalk, pavement; person;
earth, ground; door; table; mountain, mount; plant; curtain; chair; car; water; painting, picture; sofa; shelf; house;
sea; mirror; rug; field; armchair; seat; fence; desk; rock, stone; wardrobe, closet, press; lamp; tub; rail; cushion;
base, pedestal, stand; box; column, pillar; signboard, sign; chest of drawers, chest, bureau, dresser; counter; sand;
sink; skyscraper; fireplace; refrigerator, icebox; grandstand, covered stand; path; stairs; runway; case, display
case, showcase, vitrine; pool table, billiard table, snooker table; pillow; screen door, screen; stairway, staircase;
river; bridge, span; bookcase; blind, screen; coffee table; toilet, can, commode, crapper, pot, potty, stool, throne;
flower; book; hill; bench; countertop; stove; palm, palm tree; kitchen island; computer; swivel chair; boat; bar;
arcade machine; hovel, hut, hutch, shack, shanty; bus; towel; light; truck; tower; chandelier; awning, sunshade,
sunblind; street lamp; booth; tv; plane; dirt track; clothes; pole; land, ground, soil; bannister, banister,
balustrade, balusters, handrail; escalator, moving staircase, moving stairway; ottoman, pouf, pouffe, puff, hassock;
bottle; buffet, counter, sideboard; poster, posting, placard, notice, bill, card; stage; van; ship; fountain; conveyer
belt, conveyor belt, conveyer, conveyor, transporter; canopy; washer, automatic washer, washing machine; plaything,
toy; pool; stool; barrel, cask; basket, handbasket; falls; tent; bag; minibike, motorbike; cradle; oven; ball; food,
solid food; step, stair; tank, storage tank; trade name; microwave; pot; animal; bicycle; lake; dishwasher; screen;
blanket, cover; sculpture; hood, exhaust hood; sconce; vase; traffic light; tray; trash can; fan; pier; crt screen;
plate; monitor; bulletin board; shower; radiator; glass, drinking glass; clock; flag""",
    range(150),
    [number for number in range(150) if number not in _ADE20K_STUFF],
)

CITYSCAPES = _classes(
    """\
road; sidewalk; building; wall; fence; pole; traffic light; traffic sign; vegetation; terrain; sky; person; rider;
car; truck; bus; train; motorcycle; bicycle""",
    (7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33),
    (*range(24, 29), 31, 32, 33),
)

MAPILLARY = _classes(
    """\
Bird; Ground Animal; Curb; Fence; Guard Rail; Barrier; Wall; Bike Lane; Crosswalk - Plain; Curb Cut; Parking;
Pedestrian Area; Rail Track; Road; Service Lane; Sidewalk; Bridge; Building; Tunnel; Person; Bicyclist; Motorcyclist;
Other Rider; Lane Marking - Crosswalk; Lane Marking - General; Mountain; Sand; Sky; Snow; Terrain; Vegetation; Water;
Banner; Bench; Bike Rack; Billboard; Catch Basin; CCTV Camera; Fire Hydrant; Junction Box; Mailbox; Manhole; Phone
Booth; Pothole; Street Light; Pole; Traffic Sign Frame; Utility Pole; Traffic Light; Traffic Sign (Back); Traffic Sign
(Front); Trash Can; Bicycle; Boat; Bus; Car; Caravan; Motorcycle; On Rails; Other Vehicle; Trailer; Truck; Wheeled
Slow; Car Mount; Ego Vehicle""",
    range(1, 66),
    (1, 2, 9, *range(20, 25), *range(33, 44), *range(45, 59), *range(60, 64)),
)

CLASSES = {
    "coco": COCO,
    "coco_panoptic": COCO_PANOPTIC,
    "ade20k": ADE20K,
    "ade20k_instance": ADE20K.only_things(),
    "cityscapes": CITYSCAPES,
    "cityscapes_instance": CITYSCAPES.only_things(),
    "mapillary": MAPILLARY,
}
