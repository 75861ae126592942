"""Every field of a run, with its unit, its default and where the default comes from.

The other files of this folder call `get_config` and override what differs. On the command line a
field is overridden as `--config.batch_size=16` or `--config.backbone.name=resnet34`.

Sources named below: "paper" is PRN (CVPR 2023, arXiv 2212.02031) as far as its abstract, Fig. 3 and
those who cite it say; "PRNet" is the public, unofficial PyTorch code (xcyao00/PRNet);
"DiffusionAD" is the later, official code of PRN's first author; "ours" is our choice, made by
measurement (docs/experiments.md) or for the reason given.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the configuration that all others start from."""
    config = ConfigDict()

    # --- what to train -------------------------------------------------------------------------
    # One category's name, or "all": every category that is found, one after another.
    config.category = "all"
    # Height and width in pixels, divisible by 32; one number means a square. Paper: 256x256.
    config.image_size = (256, 256)
    # Rows and columns of tiles, each of `image_size`, into which an image is cut; one number means
    # as many of both; (1, 1): not cut, as in the paper. The image is resized before, to
    # rows * height - (rows - 1) * tile_overlap, and likewise in width. See docs/datasets.md.
    config.tiles = (1, 1)
    # Pixels that neighbouring tiles share, in which their maps fade into each other; at most half
    # of a tile's side. Ours: one pixel of the coarsest features.
    config.tile_overlap = 32
    # Seen anomalies per category, of all defect types together (paper: 10). They train, and leave
    # the test set. 0 is the unsupervised protocol: simulated anomalies only.
    config.num_seen = 10
    # Seed of the draw of the seen anomalies. 42 is DRA's and CPR's.
    config.split_seed = 42
    # Seed of everything else: initial values, prototypes, the sampling plan, every synthesis.
    config.seed = 0

    # --- where the data is ---------------------------------------------------------------------
    config.data = ConfigDict()
    # The TFDS builder: mvtec_ad, dagm2007, btad, kolektor_sdd2, folder, demo.
    config.data.name = "mvtec_ad"
    # The raw files: the folder that holds the category folders, as the official archive unpacks.
    config.data.manual_dir = "~/data/mvtec_ad"
    # Where the TFRecords go, local or gs://. TFDS's own default.
    config.data.data_dir = "~/tensorflow_datasets"
    # Share of the normal training images, drawn by split_seed, that are kept out of training and
    # prototypes: their scores say how many false alarms a threshold gives. 0: none, as in the
    # paper.
    config.data.holdout = 0.0

    # --- the network (paper, Fig. 3) -----------------------------------------------------------
    config.backbone = ConfigDict()
    # resnet18 (PRNet; Fig. 3 has as many maps), resnet34, resnet50, wide_resnet50_2,
    # efficientnet_lite0.
    config.backbone.name = "resnet18"
    # A hub id, a .safetensors, .npz or .pth file, "random", or "" for the backbone's own default
    # (resnet18: timm/resnet18.tv_in1k, torchvision's IMAGENET1K_V1).
    config.backbone.weights = ""
    # Stages 1 to 3 are frozen: the prototypes are made with them. Stage 4 feeds only the decoder;
    # whether the paper trains it is not known. MemSeg, its ancestor, does; PRNet does not.
    config.backbone.train_stage4 = True
    # How many times the image is doubled (bilinearly) before the backbone, -2 to 2: maps of twice
    # the detail at four times the work, each time; below 0 it is halved. Of several, (0, 1), each
    # has prototypes and a decoder of its own. (): by `image_size` and the normal images: below 256
    # pixels two looks, as it is and doubled; from there on as it is and halved, or as it is alone
    # where the product has no pose (docs/experiments_plus.md, 33 and 39). Beyond the paper.
    config.backbone.doublings = (0,)
    # Of several looks, mean: the logits are the mean of theirs, and so is what the loss is of;
    # max: each has a loss of its own, and of their logits the highest counts: what one look finds
    # is found; auto: max from 256 pixels on, else mean.
    config.backbone.merge = "mean"

    config.prototypes = ConfigDict()
    # Whether the residuals of whole maps are an input. False: for ablations.
    config.prototypes.enabled = True
    # Prototypes per training image and scale: K = max(1, int(ratio * N)). PRNet: 0.1.
    config.prototypes.ratio = 0.1
    # Normal images that prototypes and memory are made of, at most, evenly spread over all: bounds
    # the memory for it (three times the feature maps of one scale, 1 MB an image at 256x256 for
    # ResNet-18) and, by the ratio, the prototypes (1.8 MB each). Ours; PRNet takes all, which
    # are no more in every benchmark but KolektorSDD2 (2085).
    config.prototypes.max_images = 1000
    # Lloyd iterations of k-means, at most; it stops when no assignment changes. Ours
    # (scikit-learn's, which PRNet uses, stops at 300).
    config.prototypes.iterations = 50

    # Normal patches that are found anywhere, as inputs beside the prototypes. Beyond the paper.
    config.memory = ConfigDict()
    # Patches stored per scale, a greedy coreset of the normal images' (PatchCore); 0: none. With
    # total_steps=0 and no number given, 4096. Ours.
    config.memory.patches = 0
    # Scales that have a memory, counted from 1 (stride 4). PatchCore: 2 and 3; ours, for its map
    # is better with 1.
    config.memory.scales = (1, 2, 3)
    # Side, in places, of the window in which the nearest place of all stored maps is sought; odd;
    # 0: none.
    config.memory.window = 0

    # A map beside the network's, of what training did not teach it: `weight` times log(d / r), of
    # the distance d to the nearest of `patches` per scale of another frozen backbone and of its
    # mean r at a normal image's farthest place, is added to the logits. 0: none. Beyond the paper;
    # what it is worth, and its price: docs/experiments_use.md, 36.
    config.patch_map = ConfigDict()
    config.patch_map.weight = 0.0
    config.patch_map.patches = 1024
    config.patch_map.backbone = ConfigDict()
    # Both as above; it is ResNet-18 that adds most (docs/experiments_use.md, 35).
    config.patch_map.backbone.name = "resnet18"
    config.patch_map.backbone.weights = ""

    config.fusion = ConfigDict()
    # Whether scales are fused. False: for ablations.
    config.fusion.enabled = True

    config.attention = ConfigDict()
    # Attention layers per scale, N of Fig. 3. PRNet: 3.
    config.attention.layers = 3
    # Scales that have them, counted from 1 (stride 4). Fig. 3: all; without 1 it is faster.
    config.attention.scales = (1, 2, 3)
    # The map is cut into d x d patches for each d; each d owns an equal share of the channels.
    # Fig. 3 draws three sizes; PRNet's are H, H/2, H/4, H/8, each for all channels. A single patch
    # (d = 1) has nothing to attend to: its channels are only projected.
    config.attention.divisions = (1, 2, 4, 8)
    # Whether the conv that merges the sizes has a batch norm, as PRNet's have; Fig. 3 shows a conv
    # alone. Without, at 256x256, maps grow from layer to layer until the softmax fails
    # (docs/experiments.md, 43).
    config.attention.norm = True

    config.decoder = ConfigDict()
    # Whether the decoder sees the backbone's first map too, at stride 2, for sharper borders.
    # MemSeg, PRN's ancestor, does; Fig. 3 shows nothing finer than stride 4.
    config.decoder.stem = False
    # For speed (configs/fast.py): the share of the decoder's channels, 64, 128 and 256 at strides
    # 4, 8 and 16, and the stride of its finest level, 1, 2 or 4, from which logits are brought up
    # bilinearly to the image's size.
    config.decoder.width = 1.0
    config.decoder.stride = 1

    # --- the loss (PRNet and DiffusionAD agree) ------------------------------------------------
    config.loss = ConfigDict()
    config.loss.focal_weight = 5.0
    config.loss.focal_alpha = 0.5
    config.loss.focal_gamma = 4.0
    # Weight of the batch's Dice loss, which the many pixels without an anomaly do not water down;
    # 0: none. Beyond the paper.
    config.loss.dice_weight = 0.0

    # --- training ------------------------------------------------------------------------------
    # Images per step over all devices and hosts. PRNet: 48; ours divides among more devices. What
    # was measured here (docs/experiments.md) had 16.
    config.batch_size = 64
    # Passes over the normal images: steps = epochs * N // round(batch_size * normal share).
    # PRNet: 700.
    config.epochs = 700
    # Steps, whatever `epochs` says; -1: as many as `epochs` says; 0: nothing is trained, and the
    # map is the distance to the nearest of `memory.patches`: an answer within minutes.
    config.total_steps = -1
    config.optimizer = ConfigDict()
    # AdamW's peak learning rate, reached after the warm-up, then a cosine to 0. Ours; PRNet: Adam,
    # 1e-4 throughout. Twice as much is for smaller networks (docs/experiments_fast.md).
    config.optimizer.learning_rate = 1e-3
    # Decoupled weight decay, on kernels only. Ours; PRNet's 1e-2 is added to the gradient, of all
    # parameters.
    config.optimizer.weight_decay = 1e-2
    # Share of the steps that warm up linearly (MemSeg: 0.1).
    config.optimizer.warmup = 0.1
    # A gradient whose norm over all parameters is greater is scaled down to it; 0: never. Ours: one
    # batch with a gradient 20 times the usual spoils hundreds of steps (docs/experiments.md, 44: of
    # batches of 16, on one category). TensorBoard's gradient_norm, which is of before, says what is
    # usual.
    config.optimizer.clip = 0.05
    # Decay per step of a moving average of the weights, which is evaluated and kept in place of
    # the last step's; 0: none. Beyond the paper.
    config.optimizer.average = 0.0
    # The compute type: float32, bfloat16, or auto (bfloat16 on TPU and GPU, float32 on CPU and on
    # NVIDIA's GPUs before Ampere). Parameters, statistics, losses and the prototypes' distances are
    # float32 always; float32 is not rounded to what a TPU or a GPU is faster with.
    config.dtype = "auto"

    # --- the sampling plan: shares of a batch ----------------------------------------------------
    # PRNet: half normal, a quarter simulated, a quarter seen and extended. How many of those are
    # seen is ours; CPR has eight extended for each.
    config.sampling = ConfigDict()
    config.sampling.normal = 0.5
    config.sampling.seen = 0.125
    config.sampling.extended = 0.125
    config.sampling.simulated = 0.25

    # --- synthesis -------------------------------------------------------------------------------
    config.synthesis = ConfigDict()
    # Textures for simulated anomalies: "" (scikit-image's bundled ones and procedural ones), "dtd"
    # (the training split of TFDS's own, a third of DTD, prepared under data.data_dir) or a folder
    # of images, searched recursively.
    config.synthesis.textures = ""
    # Textures held in memory, at most (200 kB each at 256x256), evenly spread over what is there.
    # Ours: DTD has 5640, of which PRNet and DiffusionAD read one for each anomaly.
    config.synthesis.max_textures = 600
    # A pixel shows when a channel changed by so many grey levels of 255; a pasted region shows, and
    # is marked whole as people mark, when at least this share of it does. Ours.
    config.synthesis.visible_change = 8
    config.synthesis.visible_share = 0.5
    # A simulated anomaly shows on at least this share of the image; what does not show is drawn
    # anew, at most so many times (DiffusionAD: any pixel, 50 times). Ours.
    config.synthesis.min_area = 0.0002
    config.synthesis.attempts = 20
    # Half of a simulated anomaly changes by so many times the image's roughness (the median
    # difference of neighbouring pixels) more than `visible_change`, else it is drawn anew: on
    # gravel 8 grey levels are invisible. Ours.
    config.synthesis.simulated_contrast = 3.0
    # Simulated anomalies (DiffusionAD's values, and DRAEM's before it): the finest Perlin grid is
    # 2**5 cells, noise above the threshold is anomalous, three of ten operations on the content.
    # Ours: on a texture anywhere in the image (DiffusionAD keeps to a random part of it); what is a
    # texture the normal images tell (DiffusionAD has a list, with zipper in it); where they are all
    # grey, so is what is pasted, as on extended anomalies.
    config.synthesis.perlin_max_exponent = 5
    config.synthesis.perlin_threshold = 0.5
    config.synthesis.operations = 3
    # Probability that an object's own image, cut into a grid and shuffled, is the content.
    config.synthesis.self_source = 0.5
    config.synthesis.shuffle_grid = 8
    # Opacity of the content (DiffusionAD: beta ~ U(0.2, 0.8)).
    config.synthesis.simulated_opacity = (0.2, 0.8)
    # Extended anomalies. CPR's rendering of PRN: one to five pieces, spatial transformation with
    # probability 0.9, colour with 0.5, scale 0.5 to 1.5, opacity 0.5 to 1. Ours: at most three
    # pieces, and half of them opaque, as PRNet's all are; they lie on the product, as most of
    # PRNet's do (anywhere, In&Out says of PRN), around one of 256 places of each normal image,
    # those too that are not turned; half of the turned ones are mirrored; the colour changes in
    # brightness, hue and saturation (CPR: three of nine operations).
    config.synthesis.max_pastes = 3
    config.synthesis.extended_spatial = 0.9
    config.synthesis.extended_colour = 0.5
    config.synthesis.extended_scale = (0.5, 1.5)
    config.synthesis.extended_opacity = (0.5, 1.0)
    config.synthesis.extended_opaque = 0.5
    # What is pasted: a defect type is drawn, a seen image of it, then with this probability all
    # regions of its mask as they lie, else one of them. Ours.
    config.synthesis.extended_together = 0.5
    # Regions of a seen mask below this many pixels are not moved by themselves, unless there is no
    # other.
    config.synthesis.min_region = 8
    # What is pasted is softened, edges and all, by a Gaussian of so many pixels: a pasted edge is a
    # step from one pixel to the next, a photographed one hardly ever is. 0: not. Ours.
    config.synthesis.softness = 0.0
    # Probability and strength of the light augmentation that keeps the label: brightness by up to
    # +-10 % and 10 grey levels, and a shift by up to `shift` of the side. Seen anomalies only: ten
    # images are few.
    # Normals stay as they are, as in DiffusionAD.
    config.synthesis.augment_seen = 0.5
    config.synthesis.augment_normal = 0.0
    config.synthesis.shift = 0.02
    # Whether samples of every kind are flipped and turned by quarters, as far as the normal images
    # show that the product has no pose (synthesis/pose.py). Beyond the paper; what it is worth:
    # docs/experiments_plus.md, 29.
    config.synthesis.turns = False

    # --- scoring and evaluation ------------------------------------------------------------------
    # The score of an image is the mean of its highest pixels: this many at 256x256, in proportion
    # to the area at other sizes. PRNet: 100; DiffusionAD: 50.
    config.score_pixels = 100
    # How many logits of that score a standard deviation of the whole image's distance from normal
    # ones is worth (of its logarithm, over the training images: ten at least): what differs
    # everywhere a little, and dots that are too small for the map, have a part in it. It counts as
    # far as that distance tells the seen anomalies from normal images; without any, not. 0: not at
    # all. Beyond the paper (docs/experiments_use.md, 41 and 42).
    config.score_distance = 0.0
    # Whether a map is the mean of the image's in all turns and flips that the normal images show to
    # be as good (as with synthesis.turns): 8 of a texture, so 8 times the work of prediction; as it
    # is alone of a product with a pose. Beyond the paper.
    config.average_turns = False
    # Shares of new normal images, in (0, 1), that may be called anomalous: results and report show
    # the threshold that keeps each, and its recall, where normal images were held out. Ours. A run
    # that is finished keeps those that it had.
    config.thresholds = ConfigDict()
    config.thresholds.false_alarms = (0.001, 0.01, 0.05)
    # Save, and evaluate on the test split, every so many steps, for curves only; 0: only at the
    # end. The last checkpoint counts, always.
    config.eval_every = 0
    # Images per evaluation batch over all devices.
    config.eval_batch_size = 32

    # --- logs and checkpoints --------------------------------------------------------------------
    # Steps between two progress lines and TensorBoard points.
    config.log_every = 10
    # The step after which a profile for TensorBoard or XProf begins, and the steps that it takes;
    # 0: none. 10 is past compilation.
    config.profile = ConfigDict()
    config.profile.first_step = 0
    config.profile.steps = 5
    # Steps and minutes between two checkpoints, whichever comes first; 0 switches one off. Minutes
    # are looked at every `log_every` steps. The last step is always saved.
    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 500
    config.checkpoint.every_minutes = 10.0
    # Checkpoints kept, the newest first.
    config.checkpoint.keep = 2
    return config
